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

from evaluate import TrainedRun, gather_sets, make_parser, report, write_csv
from paper.common import all_tables, score_run
from paper.fair import add_others
from train_gen import find_images, read_images, run_script

# the 50 animal classes of CIFAR-100 (its ten animal superclasses, people among them)
ANIMALS = """aquarium_fish baby bear beaver bee beetle boy butterfly camel caterpillar cattle
    chimpanzee cockroach crab crocodile dinosaur dolphin elephant flatfish fox girl hamster kangaroo
    leopard lion lizard lobster man mouse otter porcupine possum rabbit raccoon ray seal shark shrew
    skunk snail snake spider squirrel tiger trout turtle whale wolf woman worm""".split()

# --- CIFAR+N -------------------------------------------------------------------------------------
def animals(name):
    """CIFAR+N of Table 3, "cifar+50" or "cifar+10:SPLIT": names of N classes. Raises ValueError."""
    if name == "cifar+50":
        return ANIMALS
    if not re.fullmatch("cifar[+]10:[0-4]", name):
        raise ValueError(f"no set {name!r}: cifar+50 and cifar+10:0 to cifar+10:4, a split each")
    chance = np.random.default_rng(int(name[-1]))
    return sorted(chance.choice(ANIMALS, 10, replace=False).tolist())

def read_animals(name, size, source):
    """A set of that name, of CIFAR-100 as find_images takes it -> (uint8 images (N, 3, S, S), -1 for
    each, their rows)."""
    wanted = animals(name)
    images, labels, classes = find_images(source, "test")
    rows = [i for i, label in enumerate(labels) if classes[label] in wanted]
    x = read_images([images[i] for i in rows], 3, size)
    return x, torch.full((len(x),), -1), rows

# --- SC-OOD --------------------------------------------------------------------------------------
def read_line(line, K):
    """A line of a list -> path, label, -1 = OOD, else 0 to K - 1. Raises ValueError, KeyError."""
    name, _, rest = line.decode().partition(" {")
    label = json.loads("{" + rest)["sc_label"]
    if type(label) is not int or label not in range(-1, K):
        raise ValueError(f"sc_label {label} is not in -1 to {K - 1}")
    return name, label

def read_list(file, K):
    """A list of SC-OOD -> paths, labels. Raises ValueError."""
    names = []
    labels = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            name, label = read_line(line, K)
        except (ValueError, KeyError) as error:
            raise ValueError(f'{file}, line {number}: {error}; a line is: PATH {{"sc_label": 3}}'
                             ) from error
        names.append(name)
        labels.append(label)
    if not names:
        raise ValueError(f"{file} is empty")
    return names, labels

def find_lists(root, K):
    """ROOT's lists for K classes. Raises OSError."""
    found = sorted(Path(root, "imglist").glob("benchmark_*"))
    # cifar10's labels mean nothing to a run of another number of classes
    folders = [folder for folder in found if folder.name == f"benchmark_cifar{K}"]
    if not folders:
        folders = [f for f in found if not re.fullmatch("benchmark_cifar[0-9]+", f.name)]
    lists = sorted(folders[0].glob("test_*.txt")) if len(folders) == 1 else []
    if not lists:
        raise OSError(f"{root} must hold images/ and, for {K} classes, imglist/benchmark_cifar{K}/"
                      "test_*.txt, or the lists of one benchmark of another name")
    return lists

def read_scood(root, settings):
    """{set: (uint8 images (N, C, S, S), labels (N,), their names)} of ROOT's lists, for a generator
    of these settings. Raises OSError or ValueError."""
    K = len(settings["classes"])
    sets = {}
    for file in find_lists(root, K):
        names, labels = read_list(file, K)
        if min(labels) >= 0:
            print(f"{file.name} lists no OOD image and is left out")
            continue
        paths = [str(Path(root, "images", name)) for name in names]
        x = read_images(paths, settings["channels"], settings["image_size"])
        sets[file.stem.removeprefix("test_")] = x, torch.tensor(labels), names
    return sets

def main(argv=None):
    """Score the run's test split and these sets, with the rows of paper.fair; write results.json
    and scores.csv."""
    parser = make_parser(__doc__)
    parser.add_argument("--root", help="of the SC-OOD benchmark")
    parser.add_argument("--sets", nargs="+", default=[], help="cifar+50, cifar+10:0 to cifar+10:4")
    parser.add_argument("--cifar100", metavar="FOLDER", default="cifar100",
                        help="with its images as test/<class>/ [torchvision's]")
    parser.add_argument("--out", metavar="FOLDER", help="[RUN/scood]")
    parser.set_defaults(ood=[])
    args = parser.parse_args(argv)
    if not (args.root or args.sets):
        parser.error("name --root or --sets")
    run = TrainedRun(args)
    settings = run.generator["settings"]
    out = Path(args.out or Path(args.run, "scood"))
    out.mkdir(parents=True, exist_ok=True)

    # the run's test images, and in place of its unknown ones these sets
    found = read_scood(args.root, settings) if args.root else {}
    for name in args.sets:
        found[name] = read_animals(name, settings["image_size"], args.cifar100)
    sets = gather_sets(args, run)
    sets.pop("unknown", None)
    for name, (x, truth, names) in found.items():
        sets[name] = x.to(args.device), truth.to(args.device), names

    detector, scored, held_out = score_run(run, sets, args.masks)
    add_others(run, sets, scored, held_out)
    report(out, run, detector, scored, all_tables(scored))
    write_csv(out / "scores.csv", scored, sets, run)

if __name__ == "__main__":
    run_script(main)
