"""The SC-OOD benchmark (Tables 1, 2, 7 to 10) and CIFAR+N for open-set recognition (Table 3).

    python -m paper.scood --run runs/cifar10 --root ROOT         # writes RUN/scood/results.json
    python -m paper.scood --run runs/vehicles --sets cifar+10:0 cifar+50

ROOT holds images/ and imglist/benchmark_cifar10/test_*.txt. A line is a path, a space and a JSON
object whose "sc_label" is -1 for OOD, else the class that the image really shows: such images count
as in-distribution.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch

from evaluate import gather_sets, report, write_csv
from paper.common import Run, run_parser
from train_gen import find_images, read_images, run_script

# the 50 animal classes of CIFAR-100 (its ten animal superclasses, people among them)
ANIMALS = """aquarium_fish baby bear beaver bee beetle boy butterfly camel caterpillar cattle
    chimpanzee cockroach crab crocodile dinosaur dolphin elephant flatfish fox girl hamster kangaroo
    leopard lion lizard lobster man mouse otter porcupine possum rabbit raccoon ray seal shark shrew
    skunk snail snake spider squirrel tiger trout turtle whale wolf woman worm""".split()

def animals(name):
    """CIFAR+N of Table 3, "cifar+50" or "cifar+10:SPLIT": names of N classes. Raises ValueError."""
    if name == "cifar+50":
        return ANIMALS
    if not re.fullmatch("cifar[+]10:[0-4]", name):
        raise ValueError(f"no set {name!r}: cifar+50 and cifar+10:0 to cifar+10:4, a split each")
    return sorted(np.random.default_rng(int(name[-1])).choice(ANIMALS, 10, replace=False).tolist())

def read_list(file, K):
    """A list of SC-OOD -> paths, labels, -1 = OOD, else 0 to K - 1. Raises ValueError."""
    names, labels = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            name, _, rest = line.decode().partition(" {")
            labels.append(json.loads("{" + rest)["sc_label"])
            if type(labels[-1]) is not int or labels[-1] not in range(-1, K):
                raise ValueError(f"sc_label {labels[-1]} is not in -1 to {K - 1}")
        except (ValueError, KeyError) as error:
            raise ValueError(f'{file}, line {number}: {error}; a line is: PATH {{"sc_label": 3}}'
                             ) from error
        names.append(name)
    if not names:
        raise ValueError(f"{file} is empty")
    return names, labels

def read_scood(root, settings):
    """{set: (uint8 images (N, C, S, S), labels (N,), their names)} of ROOT's lists for this number
    of classes. Raises OSError or ValueError."""
    K, found = len(settings["classes"]), sorted(Path(root, "imglist").glob("benchmark_*"))
    # cifar10's labels mean nothing to a run of another number of classes
    folders = [f for f in found if f.name == f"benchmark_cifar{K}"] or [
        f for f in found if not re.fullmatch("benchmark_cifar[0-9]+", f.name)]
    lists = sorted(folders[0].glob("test_*.txt")) if len(folders) == 1 else []
    if not lists:
        raise OSError(f"{root} must hold images/ and, for {K} classes, imglist/benchmark_cifar{K}/"
                      "test_*.txt, or the lists of one benchmark of another name")
    sets = {}
    for file in lists:
        names, labels = read_list(file, K)
        if min(labels) >= 0:
            print(f"{file.name} lists no OOD image and is left out")
            continue
        x = read_images([str(Path(root, "images", name)) for name in names], settings["channels"],
                        settings["image_size"])
        sets[file.stem.removeprefix("test_")] = x, torch.tensor(labels), names
    return sets

def main(argv=None):
    """Score the run's test split and these sets; write results.json and scores.csv."""
    parser = run_parser(__doc__)
    parser.add_argument("--root", help="of the SC-OOD benchmark")
    parser.add_argument("--sets", nargs="+", default=[], help="cifar+50, cifar+10:0 to cifar+10:4")
    parser.add_argument("--out", metavar="FOLDER", help="[RUN/scood]")
    args = parser.parse_args(argv)
    run, out = Run(args), Path(args.out or Path(args.run, "scood"))
    found = read_scood(args.root, run.settings) if args.root else {}
    for name in args.sets:
        wanted, (images, y, classes) = animals(name), find_images("cifar100", "test")
        rows = [i for i, label in enumerate(y) if classes[label] in wanted]
        x = read_images([images[i] for i in rows], 3, run.settings["image_size"])
        found[name.partition(":")[0]] = x, torch.full((len(x),), -1), rows
    if not found:
        parser.error("name --root or --sets")
    sets = {**gather_sets(args, run.about, run.trained), **found}
    sets.pop("unknown", None)
    out.mkdir(parents=True, exist_ok=True)
    detector, held = run.detector()
    scored = run.score(detector, held, sets)
    report(args, out, detector, run.about, run.trained, scored, len(held["label"]))
    write_csv(out / "scores.csv", scored, {name: s[2] for name, s in sets.items()}, run.classes)

if __name__ == "__main__":
    run_script(main)
