"""Development experiments: choose settings without looking at a test image.

    python -m paper.develop runs/dev/?-? --first min-p   # prints the gain over it, run by run
    python -m paper.develop --digits runs/dev            # trains the nine digits runs, first

The held-out images of a run stand against at most 2,000 training images of classes that it does not
know. p-values come from the even held-out images, numbers from the odd ones: nothing is flattered.
Digits: three splits of 0 to 5 with three seeds each; 6 to 9, the headline's OOD, stay unseen.
Writes these and how x' follows x and y into RUN/develop.json, which `python -m paper.compare RUN...
--file develop.json` reads, too.
"""

import math
from pathlib import Path

import numpy as np
import torch

import train_gen
import train_scorer
from evaluate import Scored, TrainedRun, make_parser, provenance, write_json
from moodcat import kl_divergence
from paper import compare
from paper.common import all_tables, score_run

MOST = 2000  # OOD images, evenly spaced
SPLITS = dict(a=("0123", "45"), b=("2345", "01"), c=("0145", "23"))  # known, unknown digits

def unknown_rows(data, known, wanted):
    """Which rows of Split.unknown (the training split's) show the classes `wanted`, None = all: at
    most MOST. Raises ValueError."""
    _, labels, classes = train_gen.find_images(data, "train")
    unknown = [classes[label] for label in labels if classes[label] not in known]
    rows = np.flatnonzero([wanted is None or name in wanted for name in unknown])
    if not len(rows):
        raise ValueError("no training image of an unknown class: train with fewer --known-classes")
    return torch.from_numpy(rows[::math.ceil(len(rows) / MOST)])

@torch.no_grad()
def synthesis(G, mask, x, y):
    """How x' follows x and y, for uint8 images x (N, C, S, S), y (N,): nats that z carries, l1 to x
    and l1 between x' under y and under the next label, both as pixel means on [-1, 1]."""
    sums = torch.zeros(3, dtype=torch.float64)
    for images, labels in zip(train_gen.to_float(x).split(256), y.split(256)):
        x_m, _ = mask(images)
        x_fake, mu, logvar = G(x_m, labels)
        x_other, _, _ = G(x_m, (labels + 1) % G.settings["num_classes"])
        l1 = (x_fake - images).abs().mean((1, 2, 3))
        change = (x_fake - x_other).abs().mean((1, 2, 3))
        sums += torch.stack([kl_divergence(mu, logvar), l1, change]).sum(1).double().cpu()
    nats, l1, change = (sums / len(x)).tolist()
    return dict(nats=nats, l1=l1, change=change)

def odd_half(s):
    """A Scored of the images 1, 3, 5, ..."""
    scores = {method: values[1::2] for method, values in s.scores.items()}
    return Scored(s.truth[1::2], s.y[1::2], scores)

def develop(args, wanted):
    """Score one run, write its develop.json."""
    run = TrainedRun(args)
    rows = unknown_rows(run.data.source, run.classes, wanted).to(args.device)
    x = run.data.unknown[rows]
    truth = torch.full_like(rows, -1)
    detector, scored, held_out = score_run(run, {"unknown": (x, truth, rows)}, args.masks)
    for (_, labels), s in held_out.items():
        scored["in-distribution", labels] = odd_half(s)
    follows = synthesis(run.G, detector.mask, *run.data.held_out_images())
    print("{run}: z carries {nats:.1f} nats, l1 to x {l1:.3f}, change with y {change:.3f}".format(
        run=args.run, **follows))
    write_json(Path(args.run, "develop.json"), dict(
        provenance(), split="development", settings=run.settings(), **run.scoring(),
        n={name: len(s.truth) for (name, _), s in scored.items()},
        synthesis=dict(generator={"held-out": follows}), **all_tables(scored)))

def train_digits(folder):
    """The nine runs of the digits -> {run folder: unknown classes}."""
    runs = {}
    for seed in "012":
        for split, (known, unknown) in SPLITS.items():
            run = f"{folder}/{split}-{seed}"
            flags = ["--run", run, "--seed", seed, "--resume"]
            train_gen.main([*flags, "--known-classes", *known])
            train_scorer.main(flags)
            runs[run] = list(unknown)
    return runs

def main(argv=None):
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders [--run]")
    add("--digits", metavar="FOLDER", help="train and score the digits' nine runs there")
    add("--unknown-classes", nargs="+", metavar="CLASS", help="[all that the run does not know]")
    add("--first", metavar="METHOD", default="min-p", help="print the gain over it [%(default)s]")
    args = parser.parse_args(argv)
    if args.digits:
        runs = train_digits(args.digits)
    else:
        runs = dict.fromkeys(args.runs or [args.run], args.unknown_classes)
    for args.run, wanted in runs.items():
        develop(args, wanted)
    results = compare.load(list(runs), "develop.json")
    for protocol in ("y = C(x)", "oracle labels"):
        print(f"\n{protocol}; mean ± standard deviation (ddof 1) over {compare.describe(results)}")
        print(compare.table(results, protocol, args.first), end="")

if __name__ == "__main__":
    train_gen.run_script(main)
