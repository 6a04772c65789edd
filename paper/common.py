"""What the scripts of this folder share: a run, scored as evaluate.py does it, and tables."""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch

from evaluate import DEFAULT_SCORERS, add_joint, calibrate, make_scorers, score_set
from moodcat import ImageMask, MoodCat
from train_gen import Parser
from train_scorer import load_classifier, load_run

class PlainParser(argparse.ArgumentParser):
    """For scripts that load no run; a wrong flag ends in one line, as in the core."""
    error = Parser.error

def run_parser(doc):
    """The core's parser with evaluate.py's flags that say how a run is scored."""
    parser = Parser(doc)
    parser.add_argument("--scorers", nargs="+", metavar="NAME", help="[as evaluate.py]")
    parser.add_argument("--masks", type=int, default=1, help="average over so many [%(default)s]")
    parser.add_argument("--classifier", metavar="FILE", help="in place of RUN/classifier.pt")
    parser.set_defaults(ood=[])  # so that gather_sets() gathers the run's own test split alone
    return parser

class Run:
    """A trained run: nets, classifier, training split; args as run_parser() reads them. Raises
    OSError or ValueError."""

    def __init__(self, args):
        self.args, (self.G, self.about, self.train) = args, load_run(args)
        self.settings, self.classes = self.about["settings"], self.about["settings"]["classes"]
        self.classifier, self.id, _ = load_classifier(args.run, args.classifier, args.device,
                                                      self.classes)
        kind = "digits" if self.settings["data"] == "digits" else "colour"
        self.names = args.scorers or DEFAULT_SCORERS[kind]
        self.scorers, self.trained = make_scorers(self.names, args, self.about, self.classifier)

    def detector(self, mask=None, masks=None):
        """The detector under a mask f(x, i) -> (x_m, M), averaged over `masks` of them, calibrated
        on the held-out images; and those images' scores {column: (n,)}."""
        mask = mask or ImageMask(self.settings["mask_ratio"], self.args.seed)
        detector = MoodCat(self.G, self.scorers, mask, masks or self.args.masks)
        x, y = self.train.x[self.train.held], self.train.y[self.train.held]
        held = score_set(detector, self.classifier, x, y, "held-out")
        calibrate(detector, held, self.about, self.trained, self.id)
        return detector, held

    def score(self, detector, held, sets):
        """{set: (uint8 images (N, C, S, S), labels (N,), names)} -> {set: {column: (N,)}}."""
        scored = {name: score_set(detector, self.classifier, x.to(detector.device), labels, name)
                  for name, (x, labels, _) in sets.items()}
        add_joint(scored, held, self.names)
        return scored

def read_json(path):
    """A results file, as a dict. Raises OSError or ValueError."""
    if not Path(path).is_file():
        raise OSError(f"{path} does not exist: evaluate that run first")
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): evaluate that run again") from error

def read_scores(run):
    """RUN/scores.csv as evaluate.py had it: {set: {column: (N,)}}, "held-out" among the sets; label
    -1 = OOD. Raises OSError or ValueError."""
    classes = read_json(Path(run, "results.json"))["settings"]["classes"]
    index = {"OOD": -1, **{quote + c: i for i, c in enumerate(classes) for quote in ("'", "")}}
    sets = {}
    with open(Path(run, "scores.csv"), newline="", errors="surrogateescape") as file:
        (_, _, *columns), *lines = csv.reader(file)
    for name, _, *values in lines:
        sets.setdefault(name, []).append(values)
    number = lambda c: index.get if c in ("label", "prediction") else float
    return {name: {c: torch.tensor(list(map(number(c), values)))
                   for c, values in zip(columns, zip(*rows))} for name, rows in sets.items()}

def mean_std(values, digits=2, sign=""):
    """Numbers -> "mean ± standard deviation" (ddof 1); the mean alone of one."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{spread}"

def markdown(head, rows):
    """Column titles and rows of text -> a Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
