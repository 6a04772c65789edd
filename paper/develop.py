"""Development experiments: choose settings without looking at a test image.

    python -m paper.develop runs/dev/?-? --first min-p   # prints the gain over it, run by run
    python -m paper.develop --digits runs/dev            # trains the nine digits runs, first

The held-out images of a run stand against at most 2,000 training images of classes that it does not
know. p-values come from the even held-out images, numbers from the odd ones: nothing is flattered.
Digits: three splits of 0 to 5 with three seeds each; 6 to 9, the headline's OOD, stay unseen.
Writes these and how x' follows x and y into RUN/develop.json, which `python -m paper.compare RUN...
--file develop.json` reads, too.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch

import train_gen
import train_scorer
from evaluate import (LABELINGS, add_joint, methods_of, provenance, score_set, tabulate,
                      write_json)
from moodcat import kl_divergence
from paper import compare
from paper.common import Run, run_parser

MOST = 2000  # OOD images, evenly spaced
SPLITS = dict(a=("0123", "45"), b=("2345", "01"), c=("0145", "23"))  # known, unknown digits

def unknown_rows(settings, wanted):
    """Which rows of Split.unknown (the training split's) show the classes `wanted`, None = all: at
    most MOST. Raises ValueError."""
    _, y, classes = train_gen.find_images(settings["data"], "train")
    outside = [classes[label] for label in y if classes[label] not in settings["classes"]]
    rows = np.flatnonzero([wanted is None or name in wanted for name in outside])
    if not len(rows):
        raise ValueError("no training image of an unknown class: train with fewer --known-classes")
    return torch.from_numpy(rows[::math.ceil(len(rows) / MOST)])

@torch.no_grad()
def synthesis(G, mask, x, y):
    """How x' follows x and y, for uint8 images x (N, C, S, S), y (N,): nats that z carries, l1 to x
    and l1 between x' under y and under the next label, both as pixel means on [-1, 1]."""
    sums = torch.zeros(3, dtype=torch.float64)
    for xs, ys in zip(train_gen.to_float(x).split(256), y.split(256)):
        x_m, _ = mask(xs)
        x_fake, mu, logvar = G(x_m, ys)
        other = G(x_m, (ys + 1) % G.settings["num_classes"])[0]
        l1s = [(x_fake - image).abs().mean((1, 2, 3)) for image in (xs, other)]
        sums += torch.stack([kl_divergence(mu, logvar), *l1s]).sum(1).double().cpu()
    return dict(zip(("nats", "l1", "change"), (sums / len(x)).tolist()))

def develop(args, wanted):
    """Score one run, write its develop.json."""
    run = Run(args)
    detector, held = run.detector()
    x = run.train.unknown[unknown_rows(run.settings, wanted).to(args.device)]
    unknown = score_set(detector, run.classifier, x, torch.full((len(x),), -1), "unknown")
    scored = {"in-distribution": {c: s[1::2] for c, s in held.items()}, "unknown": unknown}
    add_joint(scored, held, run.names)  # fits on the even half of `held`
    x, y = run.train.x[run.train.held], run.train.y[run.train.held]
    follows = synthesis(run.G, detector.mask, x, y)
    print(f"{args.run}: z carries {follows['nats']:.1f} nats, l1 to x {follows['l1']:.3f}, "
          f"change with y {follows['change']:.3f}")
    write_json(Path(args.run, "develop.json"), dict(
        provenance(), split="development", settings=run.settings, scorers=run.names,
        masks=args.masks, synthesis=dict(generator={"held-out": follows}),
        n={name: len(s["label"]) for name, s in scored.items()},
        **{labels: tabulate(scored, methods_of(scored), labels) for labels in LABELINGS}))

def main(argv=None):
    """Read the command line."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders [--run]")
    add("--digits", metavar="FOLDER", help="train and score the digits' nine runs there")
    add("--unknown-classes", nargs="+", metavar="CLASS", help="[all that the run does not know]")
    add("--first", metavar="METHOD", default="min-p", help="print the gain over it [%(default)s]")
    args = parser.parse_args(argv)
    runs = dict.fromkeys(args.runs or [args.run], args.unknown_classes)
    if args.digits:
        runs = {}
        for seed, (split, (known, unknown)) in itertools.product("012", SPLITS.items()):
            flags = ["--run", f"{args.digits}/{split}-{seed}", "--seed", seed, "--resume"]
            train_gen.main([*flags, "--known-classes", *known])
            train_scorer.main(flags)
            runs[flags[1]] = list(unknown)
    for args.run, wanted in runs.items():
        develop(args, wanted)
    results = compare.load(list(runs), "develop.json")
    for labels in ("predicted_labels", "oracle_labels"):
        print(f"\n{labels}; mean ± standard deviation (ddof 1) over {compare.said_over(results)}")
        print(compare.table(results, labels, args.first), end="")

if __name__ == "__main__":
    train_gen.run_script(main)
