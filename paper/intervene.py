"""Change the label of y alone, or of x' alone: does a score follow?

    python -m paper.intervene --run runs/digits                            # writes intervene.json
    python -m paper.intervene --run results/cifar10 --out runs/look --reader runs/cifar10-1
    python -m paper.intervene --run runs/mine --dev                        # chooses; no test image

Every test image x has its true label and a wrong one, uniform over the others; x' is made under
both by the same mask. AUROC of each scorer between right and wrong when x' and y change together,
as in Eq. 2, and when one of them does while the other stays right, or wrong: 50 where the score does
not look at what changes. And how often a classifier reads its label off x': --reader names the run
of one that did not train beside it [RUN].
"""

from pathlib import Path

import torch

from evaluate import ood_metrics, provenance, write_json
from moodcat import concatenated
from paper.common import load_with_test
from train_gen import Parser, run_script, to_float
from train_scorer import load_classifier, mismatched

# the labels of (x', y), 0 = right, 1 = wrong: of the upper score, of the lower one
INTERVENTIONS = {
    "x' and y": ((0, 0), (1, 1)),
    "y alone, x' right": ((0, 0), (0, 1)),
    "y alone, x' wrong": ((1, 0), (1, 1)),
    "x' alone, y right": ((0, 0), (1, 0)),
    "x' alone, y wrong": ((0, 1), (1, 1))}

@torch.no_grad()
def look(detector, reader, x, right, wrong):
    """Images x (B, C, S, S), labels (B,) -> {(scorer, label of x', label of y): (B,)}, and of x'
    {(what, its label): (B,)}: whether the reader sees its label, and l1 to x."""
    labels = right, wrong
    x_m, _ = detector.mask(x, 0)
    found = {}
    for i, made_for in enumerate(labels):
        x_fake, _, _ = detector.generator(x_m, made_for)
        found["read", i] = (reader(x_fake).argmax(1) == made_for).double()
        found["l1", i] = (x_fake - x).abs().mean((1, 2, 3))
        for name, scorer in detector.scorers.items():
            for j, y in enumerate(labels):
                found[name, i, j] = scorer(x, x_fake, y)
    return {key: values.cpu() for key, values in found.items()}

def summary(found, scorers):
    """What look() found, of all images -> {view: {scorer or "x'": {"test": numbers}}}."""
    scores = {}
    for name in scorers:
        scores[name] = {"test": {
            title: ood_metrics(found[name, *upper], found[name, *lower])["auroc"]
            for title, (upper, lower) in INTERVENTIONS.items()}}
    of_x_fake = {f"{what}, {label}": found[what, i].mean().item()
                 for what in ("read", "l1") for i, label in enumerate(("right", "wrong"))}
    return {"intervention": scores, "synthesis": {"x'": {"test": of_x_fake}}}

def main(argv=None):
    """Score all test images under both labels, print and write what follows."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--classifier", help="another run's, or a program, as trained with")
    add("--reader", metavar="RUN", help="whose classifier reads x' [RUN]")
    add("--dev", action="store_true", help="held-out training images in place of test images")
    add("--out", metavar="FOLDER", help="for intervene.json, or intervene-dev.json [RUN]")
    args = parser.parse_args(argv)
    detector, reader, test = load_with_test(args)
    if args.reader:
        reader, _, _ = load_classifier(args.reader, None, args.device, test.classes)
    x, right = test.x, test.y
    if args.dev:
        x, right = test.other("train").held_out_images()
    torch.manual_seed(0)
    wrong = mismatched(right, len(test.classes))

    found = concatenated([
        look(detector, reader, to_float(x[rows]), right[rows], wrong[rows])
        for rows in torch.arange(len(x)).split(256)])
    results = summary(found, [name for name in detector.scorers if name != "energy"])
    for name, rows in results["intervention"].items():
        for title, value in rows["test"].items():
            print(f"{name:16s}{title:20s}{100 * value:8.2f}")
    for what, value in results["synthesis"]["x'"]["test"].items():
        print(f"{'synthesis':16s}{what:20s}{value:8.3f}")
    name = "intervene-dev.json" if args.dev else "intervene.json"
    write_json(Path(args.out or args.run, name), dict(
        provenance(), n=len(x), reader=args.reader, **results))

if __name__ == "__main__":
    run_script(main)
