"""Does C_b profit from a generator that knows its images by heart?

    python -m paper.halves --run runs/digits              # writes RUN/halves.json

Trains a generator as the run's on one half of the training images of each class and then C_b twice,
on the same half and on the other, into RUN/halves/. The classifier stays the run's. After an
interruption add --resume.
"""

from argparse import Namespace
from pathlib import Path

import torch

import train_gen
from evaluate import TrainedRun, provenance, write_json
from moodcat import SCORERS, for_inference
from paper.common import subset, tables_with_energy
from paper.fair import chosen_sets
from train_gen import SETTINGS, Parser, Split, run_script
from train_scorer import load_generator, train_scorer

HALVES = {"the same images": 0, "other images": 1}  # as G's, which are half 0

def half(data, which):
    """The Split with every other training image of each class; held-out images stay."""
    keep = torch.zeros_like(data.held_out)
    for k in range(len(data.classes)):
        rows = ((data.y == k) & ~data.held_out).nonzero()[:, 0]
        keep[rows[which::2]] = True
    return subset(data, keep)

def as_flags(settings, table):
    """The settings of a table as a command line."""
    flags = []
    for name in table:
        value = settings[name]
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != []:  # all classes known
            values = value if isinstance(value, list) else [value]
            flags += [f"--{flag}", *map(str, values)]
    return flags

def train_generator(run, folder, args):
    """train_gen.py with the run's settings on half 0 -> G and its checkpoint."""
    train_gen.Split = lambda *of: half(Split(*of), 0)
    flags = as_flags(run.generator["settings"], SETTINGS)
    train_gen.main([*flags, "--run", str(folder), "--data", run.data.source, "--device",
                    args.device, *["--resume"] * args.resume])
    train_gen.Split = Split
    return load_generator(folder, args.device)

def main(argv=None):
    """Train what is not trained, score the run's sets, print and write the tables."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    add("--resume", action="store_true", help="go on where the same command stopped")
    parser.set_defaults(scorers=["cb"], classifier=None, rule=None, calibrate=None, seed=0, dev=None,
                        anew=False)
    args = parser.parse_args(argv)
    run = TrainedRun(args)
    sets = chosen_sets(args, run)

    # G on one half, C_b on either
    folder = Path(args.run, "halves")
    G, saved = train_generator(run, folder, args)
    settings = dict(run.settings(), generator=saved["settings"])
    of_c_b = run.trained["cb"]["settings"]
    scorers = {}
    for title, which in HALVES.items():
        more = dict(generator=saved["id"], half=which)
        own = Namespace(**{**vars(args), **of_c_b, "run": str(folder / str(which)),
                           "device": args.device})
        training = train_scorer(own, SCORERS["cb"], G, half(run.data, which), **more)
        scorers[f"C_b, {title}"] = for_inference(training.stateful["scorer"])
        settings[f"C_b, {title}"] = training.state["settings"]

    tables = tables_with_energy(run, G, scorers, sets)
    write_json(folder.with_suffix(".json"), dict(provenance(), settings=settings, **tables))

if __name__ == "__main__":
    run_script(main)
