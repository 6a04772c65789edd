"""What the scripts of this folder share: a run, scored as evaluate.py does it, and tables."""

import argparse
import csv
import json
from copy import copy
from pathlib import Path

import numpy as np
import torch

from evaluate import (PROTOCOLS, Scored, add_joint_scores, calibrate, format_table, load_detector,
                      score_set, tabulate)
from moodcat import ImageMask, MoodCat, joint_scores
from train_gen import Parser, Split, stored_settings

class PlainParser(argparse.ArgumentParser):
    """For scripts that load no run; a wrong flag ends in one line, as in the core."""
    error = Parser.error

# --- A run ---------------------------------------------------------------------------------------
def score_run(run, sets, masks=1, mask=None):
    """Score {set: (uint8 images, truth, names)} with a TrainedRun, as evaluate.py does: the mean
    over `masks` masks, of another kind if `mask` is given. -> the calibrated detector, {(set,
    labels): Scored}, and the same of the held-out images, whose set is "held-out"."""
    detector = MoodCat(run.G, run.scorers, mask or run.mask, masks, run.rule)
    held_out = score_set(detector, run.classifier, "held-out", *run.held_out[:2])
    predicted = held_out["held-out", "C(x)"]
    calibrate(detector, run, predicted)
    scored = {}
    for name, (x, truth, _) in sets.items():
        scored |= score_set(detector, run.classifier, name, x, truth)
    add_joint_scores(scored | held_out, predicted.scores, run.scorers)
    return detector, scored, held_out

def load_with_test(args):
    """A detector, trained here or shipped, its classifier, the test Split of its classes. Raises
    OSError or ValueError."""
    detector, classifier = load_detector(args)
    settings = detector.generator.settings
    data = args.data or stored_settings(args.run, "generator").get("data", "digits")
    test = Split(data, "test", detector.calibration["notes"]["classes"], settings["image_size"],
                 args.device, settings["channels"])
    return detector, classifier, test

def subset(data, rows):
    """The Split with the training images of these rows alone, bool (N,); held-out ones stay."""
    data = copy(data)
    keep = data.held_out | rows
    data.x, data.y, data.held_out = data.x[keep], data.y[keep], data.held_out[keep]
    data.n = int((~data.held_out).sum())
    return data

def all_tables(scored):
    """{protocol: {method: {set: metrics}}}, as results.json has them."""
    return {protocol: tabulate(scored, *labels) for protocol, labels in PROTOCOLS.items()}

def add_energy(scored, held_out, methods, title="{} with energy"):
    """To each Scored each of the methods joined with energy, by Fisher's method and the even half
    of the held-out images' scores {method: (n,)}."""
    for method in methods:
        reference = {name: held_out[name][::2] for name in (method, "energy")}
        for s in scored.values():
            s.scores[title.format(method)] = joint_scores(s.scores, reference)["fisher"]

def tables_with_energy(run, G, scorers, sets):
    """The sets of a TrainedRun by scorers {name: f(x, x', y)} of what G makes of them, alone and
    joined with energy: prints the tables, -> {protocol: {method: {set: metrics}}}."""
    settings = run.generator["settings"]
    mask = ImageMask(settings["mask_ratio"], style=settings["mask"])  # the same for every seed
    detector = MoodCat(G, scorers, mask)
    held_out = score_set(detector, run.classifier, "held-out", *run.held_out[:2])
    scored = {}
    for name, (x, truth, _) in sets.items():
        scored |= score_set(detector, run.classifier, name, x, truth)
    add_energy(scored, held_out["held-out", "C(x)"].scores, scorers, "{}, with energy")
    tables = all_tables(scored)
    for protocol, table in tables.items():
        print(f"\n{protocol}\n{format_table(table)}")
    return tables

# --- What evaluate.py wrote ----------------------------------------------------------------------
def read_json(path):
    """A results file, as a dict. Raises OSError or ValueError."""
    if not Path(path).is_file():
        raise OSError(f"{path} does not exist: evaluate that run first")
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): evaluate that run again") from error

def read_scores(run):
    """RUN/scores.csv as evaluate.py had it: {(set, labels): Scored}, "held-out" among the sets.
    Raises OSError or ValueError."""
    results = read_json(Path(run, "results.json"))
    index = {name: i for i, name in enumerate(results["settings"]["generator"]["classes"])}
    index.setdefault("OOD", -1)
    with open(Path(run, "scores.csv"), newline="") as file:
        head, *lines = csv.reader(file)
    methods = head[5:]

    # the lines of one set and kind of labels, without these and the image's name
    groups = {}
    for name, labels, _, *values in lines:
        groups.setdefault((name, labels), []).append(values)
    scored = {}
    for key, group in groups.items():
        truth, y, *columns = zip(*group)
        scored[key] = Scored(
            torch.tensor([index[name] for name in truth]),
            torch.tensor([index[name] for name in y]),
            {method: torch.tensor([float(value) for value in column])
             for method, column in zip(methods, columns)})
    return scored

def metric_of(rows, name, metric):
    """A metric of the set `name` in a method's rows {set: metrics}; of "mean", its mean over all
    these sets (SC-OOD). Raises KeyError."""
    if name == "mean":
        return np.mean([row[metric] for row in rows.values()])
    return rows[name][metric]

# --- Tables --------------------------------------------------------------------------------------
def mean_std(values, digits=2, sign=""):
    """Numbers -> "mean ± standard deviation" (ddof 1); the mean alone of one."""
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text

def markdown(head, rows):
    """Column titles and rows of text -> a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
