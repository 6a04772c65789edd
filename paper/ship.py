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

from evaluate import draw_panel, gather_sets, report
from moodcat import MoodCat, load_checkpoint, save_checkpoint
from paper.common import Run, run_parser
from train_gen import find_images, run_script
from train_scorer import load_classifier

def halved(weights):
    """A state dict with float16 for every float tensor. Raises ValueError for one too large."""
    rounded = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    if not all(bool(v.isfinite().all()) for v in rounded.values()):
        raise ValueError("a weight is too large for half precision (65504)")
    return rounded

def write_pictures(folder, images, names):
    """uint8 images (N, C, S, S) -> FOLDER/<name>.png."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, names):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).cpu().numpy()).save(
            Path(folder, f"{name}.png"))

def ship(args):
    """Write classifier.pt, detector.pt, results.json, panel.png and examples/ into args.out. Raises
    OSError or ValueError."""
    out, run = Path(args.out), Run(args)
    sets = gather_sets(args, run.about, run.trained)
    if len(sets) == 1:
        raise ValueError("no image is OOD: name OOD sets after --ood")
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
    scored = run.score(detector, held, sets)
    report(args, out, detector, run.about, run.trained, scored, len(held["label"]))
    blocks, detector = [], MoodCat.load(out / "detector.pt", args.device, run.classifier)
    for picture in out.glob("examples/*.png"):  # of another run
        picture.unlink()
    for name, (x, y, _) in sets.items():
        rows = torch.linspace(0, len(x) - 1, 10).long()  # folders come class by class
        blocks.append((name, x[rows], scored[name]["prediction"][rows]))
        known = name == "in-distribution"
        titles = [f"{run.classes[y[i]] if known else 'unknown'}-{len(blocks)}-{i}" for i in rows]
        write_pictures(out / "examples", x[rows], titles[:8 if known else 4])
    draw_panel(out / "panel.png", detector, run.classes, blocks)
    print(f"{out}: {sum(path.stat().st_size for path in out.glob('*.pt'))} bytes of weights")

def main(argv=None):
    """Read the command line."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="for the small detector")
    add("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    add("--pictures", metavar="FOLDER", help="only write digits of --split and --classes there")
    add("--split", choices=["train", "test"], default="test", help="[%(default)s]")
    add("--classes", nargs="+", default=list("0123456789"), metavar="CLASS", help="[all]")
    args = parser.parse_args(argv)
    if args.pictures:
        images, y, _ = find_images("digits", args.split)
        rows = [i for i, label in enumerate(y) if str(label) in args.classes]
        x = [torch.from_numpy(np.array(images[i]))[None] for i in rows]
        return write_pictures(args.pictures, x, [f"{args.split}-{y[i]}-{i}" for i in rows])
    if args.classifier or not args.out or Path(args.out).resolve() == Path(args.run).resolve():
        parser.error("--out needs a folder of its own; the run's own classifier is shipped")
    ship(args)

if __name__ == "__main__":
    run_script(main)
