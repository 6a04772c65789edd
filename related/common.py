"""What mood.py and shift.py share: what they score, and their results beside the run's others."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from evaluate import format_table, gather_sets, provenance, write_json

PROTOCOL = "y = C(x)"  # that of evaluate.PROTOCOLS by which MOOD and SHIFT are scored
OPTIONAL = "timm", "transformers", "diffusers"

def choose_sets(args, data, unknown):
    """What to score: {set: (uint8 images, labels, names)}. Test images and OOD sets; with --dev the
    held-out images of the training split against unknown ones. Raises OSError, ValueError."""
    if args.dev:
        no_class = torch.full((len(unknown),), -1)
        return {"in-distribution": (*data.held_out_images(), None),
                "unknown": (unknown, no_class, None)}
    sets = gather_sets(args, SimpleNamespace(data=data, classes=data.classes, trained={}))
    if len(sets) < 2:
        raise ValueError("no image is OOD: name OOD sets after --ood")
    return sets

def report(path, settings, sets, rows, beside, **more):
    """Write the rows {method: {set: metrics}} to RUN/<method>.json, with what there is `more` to
    record, and print them below those of the files `beside` it."""
    n = {name: len(x) for name, (x, _, _) in sets.items()}
    results = dict(provenance(), settings=settings, n=n, **more)
    for package in OPTIONAL:
        if sys.modules.get(package):
            results["versions"][package] = sys.modules[package].__version__
    results[PROTOCOL] = rows
    write_json(path, results)
    table = rows_beside(results, [path.with_name(name) for name in beside])
    print(f"\nPercent; images: {n}\n{format_table({**table, **rows})}")

def rows_beside(results, paths):
    """The rows of other files, where they are there and about the same images and the same
    classifier; if these results are of none, as MOOD's of a run without one, the first file's
    counts."""
    table = {}
    classifier = results.get("classifier")
    for path in filter(Path.exists, paths):
        other = json.loads(path.read_text())
        its = other.get("classifier", classifier)
        if images_of(other) == images_of(results) and classifier in (None, its):
            table.update(other[PROTOCOL])
            classifier = its
        else:
            print(f"no rows of {path}: it is about other images or another classifier")
    return table

def images_of(results):
    """What tells the images that results are about."""
    generator = results["settings"].get("generator", {})
    return results["n"], generator.get("fingerprint")
