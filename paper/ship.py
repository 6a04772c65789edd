"""Make the small detectors that come with the code, results/digits and results/cifar10.

    python -m paper.ship --run runs/digits --out results/digits
    python -m paper.ship --run runs/cifar10 --out results/cifar10 --ood FOLDER --scorers cb energy
    python -m paper.ship --pictures runs/67 --split train --classes 6 7     # digits as PNG files

All weights are rounded to float16 first; the detector is calibrated and measured then.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluate import TrainedRun, gather_sets, make_parser, report
from moodcat import MoodCat, for_inference, load_checkpoint, save_checkpoint
from paper.common import all_tables, score_run
from paper.figures import panel
from train_gen import find_images, run_script, to_float

def halved(weights):
    """A state dict with float16 for every float tensor. Raises ValueError for one too large."""
    rounded = {}
    for name, value in weights.items():
        rounded[name] = value.half() if value.is_floating_point() else value
        if not rounded[name].isfinite().all():
            raise ValueError("a weight is too large for half precision (65504)")
    return rounded

def ship_net(source, path, kind):
    """A generator.pt or classifier.pt with half the bytes. --resume goes on from it, with its
    optimizers anew. `data` loses the folders above: they are of this machine."""
    saved = load_checkpoint(source, kind)
    script = {"generator": "train_gen.py", "classifier": "train_scorer.py"}[kind]
    saved["command"] = f"python {script} --run {path.parent}"
    saved["settings"]["data"] = Path(saved["settings"]["data"]).name
    for name in ("generator", "discriminator", "classifier"):
        if name in saved:
            saved[name] = halved(saved[name])
    for name in ("opt", "opt_g", "opt_d"):
        if name in saved:
            saved[name]["state"] = {}
    save_checkpoint(path, saved)

def ship_detector(detector, path):
    """detector.pt with half the bytes. Its weights have that precision already."""
    detector.save(path)
    saved = load_checkpoint(path, "detector")
    saved["weights"] = {name: halved(weights) for name, weights in saved["weights"].items()}
    del saved["calibration"]["notes"]["files"]  # the run's, whose halves lie beside this one
    save_checkpoint(path, saved)

def write_pictures(folder, images, names):
    """uint8 images (N, C, S, S) -> FOLDER/<name>.png."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, names):
        pixels = image.permute(1, 2, 0).squeeze(2).cpu().numpy()
        Image.fromarray(pixels).save(Path(folder, f"{name}.png"))

def write_examples(folder, sets, classes):
    """Eight test images and four of each OOD set, in place of another run's. Their names tell."""
    for picture in folder.glob("*.png"):
        picture.unlink()
    for number, (name, (x, truth, _)) in enumerate(sets.items(), 1):
        rows = torch.linspace(0, len(x) - 1, 10).long()  # folders come class by class
        rows = rows[:8 if name == "in-distribution" else 4].tolist()
        called = [*classes, "unknown"]                   # -1 is the last
        names = [f"{called[truth[i]]}-{number}-{i}" for i in rows]
        write_pictures(folder, x[rows], names)

def ship(args):
    """Write generator.pt, for other scorers or losses to begin with, classifier.pt, detector.pt,
    results.json, panel.png and examples/ into args.out. Raises OSError or ValueError."""
    out = Path(args.out)
    for kind in ("generator", "classifier"):
        ship_net(Path(args.run, f"{kind}.pt"), out / f"{kind}.pt", kind)
    args.classifier = out / "classifier.pt"  # from here on the rounded one
    run = TrainedRun(args)
    args.classifier = None  # the run's own all the same: held-out images are new to it
    sets = gather_sets(args, run)
    if len(sets) == 1:
        raise ValueError("no image is OOD: name OOD sets after --ood")

    # round the nets as they are saved, without spectral norms
    for net in (run.G, *run.scorers.values()):
        if hasattr(net, "settings"):
            for_inference(net)
            net.load_state_dict(halved(net.state_dict()))
    detector, scored, _ = score_run(run, sets, args.masks)
    ship_detector(detector, out / "detector.pt")
    report(out, run, detector, scored, all_tables(scored))

    # pictures, by the detector as it is in the file
    detector = MoodCat.load(out / "detector.pt", args.device, run.classifier)
    shown = {name: (to_float(x), scored[name, "C(x)"].y) for name, (x, _, _) in sets.items()}
    panel(detector, run.classes, shown).savefig(out / "panel.png", dpi=100)
    write_examples(out / "examples", sets, run.classes)
    sizes = [path.stat().st_size for path in out.glob("*.pt")]
    print(f"{out}: {sum(sizes)} bytes of weights")

def pictures_of_digits(args):
    """--pictures: the digits of a split and of some classes as PNG files."""
    images, labels, _ = find_images("digits", args.split)
    rows = [i for i, label in enumerate(labels) if str(label) in args.classes]
    x = [torch.from_numpy(np.array(images[i]))[None] for i in rows]
    write_pictures(args.pictures, x, [f"{args.split}-{labels[i]}-{i}" for i in rows])

def main(argv=None):
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="for the small detector")
    add("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    add("--pictures", metavar="FOLDER", help="only write digits of --split and --classes there")
    add("--split", choices=["train", "test"], default="test", help="[%(default)s]")
    add("--classes", nargs="+", default=list("0123456789"), metavar="CLASS", help="[all]")
    args = parser.parse_args(argv)
    if args.pictures:
        return pictures_of_digits(args)
    if args.classifier or not args.out:
        parser.error("--out needs a folder of its own; the run's own classifier is shipped")
    if Path(args.out).resolve() == Path(args.run).resolve():
        parser.error("--out needs a folder of its own, not the run's")
    ship(args)

if __name__ == "__main__":
    run_script(main)
