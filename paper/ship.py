"""Make results/digits, the small detector that comes with the code, from a run of the digits.

    python -m paper.ship --run runs/digits --out results/digits
    python -m paper.ship --pictures runs/67 --split train --classes 6 7     # digits as PNG files

All weights are rounded to float16 first; the detector is calibrated and measured then.
"""

from pathlib import Path

import torch

from evaluate import gather_sets, report
from moodcat import load_checkpoint, save_checkpoint
from paper.common import Run, run_parser
from train_gen import find_images, run_script
from train_scorer import load_classifier

def halved(weights):
    """A state dict with float16 for every float tensor. Raises ValueError for one too large."""
    rounded = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    if not all(bool(v.isfinite().all()) for v in rounded.values()):
        raise ValueError("a weight is too large for half precision (65504)")
    return rounded

def write_pictures(folder, split, rows, prefix):
    """These rows of the digits' split -> FOLDER/<prefix>-<digit>-<row>.png, 8 x 8 pixels."""
    images, y, _ = find_images("digits", split)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in rows:
        images[i].save(Path(folder, f"{prefix}-{y[i]}-{i}.png"))

def ship(args):
    """Write classifier.pt, detector.pt, results.json and examples/ into args.out. Raises OSError or
    ValueError."""
    out, run = Path(args.out), Run(args)
    saved = load_checkpoint(Path(args.run, "classifier.pt"), "classifier")
    saved.update(classifier=halved(saved["classifier"]), opt=None, lines=[])
    save_checkpoint(out / "classifier.pt", saved)
    # its fingerprint is that of the tensors as stored: take it from the file
    run.classifier, run.id, _ = load_classifier(out, None, args.device)
    for net in (run.G, *run.scorers.values()):
        if hasattr(net, "settings"):
            net.load_state_dict(halved(net.state_dict()))
    detector, held = run.detector()
    detector.save(out / "detector.pt")
    saved = load_checkpoint(out / "detector.pt", "detector")
    for net in saved["nets"].values():
        net["weights"] = halved(net["weights"])
    save_checkpoint(out / "detector.pt", saved)
    scored = run.score(detector, held, gather_sets(args, run.about, run.trained))
    report(args, out, detector, run.about, run.trained, scored, len(held["label"]))
    y = find_images("digits", "test")[1].tolist()
    rows = sorted(range(len(y)), key=lambda i: (y[:i].count(y[i]), y[i]))  # first of each class ...
    known = [str(label) in run.classes for label in y]
    write_pictures(out / "examples", "test", [i for i in rows if known[i]][:8], "known")
    write_pictures(out / "examples", "test", [i for i in rows if not known[i]][:4], "unknown")
    print(f"{out}: {sum(path.stat().st_size for path in out.glob('*.pt'))} bytes of weights")

def main(argv=None):
    """Read the command line."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="for the small detector")
    add("--pictures", metavar="FOLDER", help="only write digits of --split and --classes there")
    add("--split", choices=["train", "test"], default="test", help="[%(default)s]")
    add("--classes", nargs="+", default=list("0123456789"), metavar="CLASS", help="[all]")
    args = parser.parse_args(argv)
    if args.pictures:
        y = find_images("digits", args.split)[1]
        rows = [i for i, label in enumerate(y) if str(label) in args.classes]
        return write_pictures(args.pictures, args.split, rows, args.split)
    if args.classifier or not args.out or Path(args.out).resolve() == Path(args.run).resolve():
        parser.error("--out needs a folder of its own; the run's own classifier is shipped")
    ship(args)

if __name__ == "__main__":
    run_script(main)
