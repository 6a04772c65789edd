"""What limits the detector: stand-ins for x', and a second classifier in C_b's place.

    python -m paper.limits --run RUN --steps 4000 --bf16 --ood FOLDER     # writes RUN/limits.json
    python -m paper.limits ... --verifier RUN2                            # RUN2/classifier.pt, too
    python -m paper.limits --run RUN --scorer compare --on synthesis "class mean" --dev 4 5
    python -m paper.limits --run RUN --per-class 10 --on synthesis nothing

Each C_b trains like the run's own, but for flags that are given, into RUN/limits/: on x' = G(x_m,
y), on x' = x, on the mean training image of class y, and on x' = 0, which leaves it x and y alone.
--scorer: another trained scorer in C_b's place; --per-class: on so many training images of each
class. SSIM compares x with x', with that mean image, and with x itself at half its size. After an
interruption add --resume. Fisher's method joins each with the classifier's energy alone. --dev
takes no test image, as paper.fair. The files of other than C_b on all images bear that in their
names: limits-compare-10-dev.json.
"""

from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluate import TrainedRun, provenance, write_json
from moodcat import SCORERS, ImageMask, for_inference, load_checkpoint, ssim
from paper.common import subset, tables_with_energy
from paper.fair import chosen_sets
from paper.scorers import ROWS
from train_gen import Parser, parse, run_script, to_float
from train_scorer import SCORER, load_classifier, train_scorer

ON = ["synthesis", "x", "class mean", "nothing"]

class StandIn:
    """In the generator's place: f(x_m, y) makes x'."""
    def __init__(self, settings, make):
        self.settings = settings
        self.make = make

    def __call__(self, x_m, y):
        return self.make(x_m, y), None, None

def class_means(data):
    """The mean training image of each class, (K, C, S, S) in [-1, 1]."""
    x, y = data.training_images()
    return torch.stack([to_float(x[y == k]).mean(0) for k in range(len(data.classes))])

def stand_ins(G, means):
    """{name: what makes x'}; "x" shows x only where nothing is masked."""
    return {"synthesis": G,
            "x": StandIn(G.settings, lambda x_m, y: x_m),
            "class mean": StandIn(G.settings, lambda x_m, y: means[y]),
            "nothing": StandIn(G.settings, lambda x_m, y: torch.zeros_like(x_m))}

def few(data, per_class, seed):
    """The Split with so many training images of each class, drawn by the seed; held-out images stay."""
    keep = torch.zeros_like(data.held_out)
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
    for k in range(len(data.classes)):
        rows = order[((data.y == k) & ~data.held_out).cpu()[order]]
        keep[rows[:per_class]] = True
    return subset(data, keep)

def train_on(name, G, args, run, data):
    """Train a scorer of the row args.scorer on these images and what G, a stand-in of that name,
    makes of them -> the scorer, its settings."""
    generator = run.generator["settings"]
    file = run.trained["cb"]["settings"]["generator"]
    more = dict(mask=generator["mask"], generator=file if name == "synthesis" else name,
                mask_ratio=0.0 if name == "x" else generator["mask_ratio"])
    folder = Path(args.run, "limits", name)
    if args.per_class:
        more["per_class"] = args.per_class
        folder = folder / str(args.per_class)
    args = Namespace(**{**vars(args), **more, "run": str(folder)})
    training = train_scorer(args, (SCORERS | ROWS)[args.scorer], G, data, **more)
    C_b = for_inference(training.stateful["scorer"])
    mask = ImageMask(args.mask_ratio, style=args.mask)  # that of every table

    def score(x, x_fake, y):
        x_m, _ = mask(x)
        x_made, _, _ = G(x_m, y)
        return C_b(x, x_made, y)
    return score, training.state["settings"]

def half_size(x):
    """x (B, C, S, S) as it looks at half its size."""
    return F.interpolate(F.avg_pool2d(x, 2), x.shape[2:], mode="bilinear")

def read_flags(argv):
    """The command line; a setting that is not given is that of the run's C_b."""
    parser = Parser(__doc__, SCORER)
    add = parser.add_argument
    add("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    add("--verifier", metavar="RUN", help="the run of a second classifier of the same classes")
    add("--scorer", default="cb", choices=["cb", *ROWS], help="what is trained [%(default)s]")
    add("--on", nargs="+", default=ON, choices=ON, help="in place of x' [%(default)s]")
    add("--per-class", type=int, help="training images of each class [all]")
    add("--dev", nargs="*", metavar="CLASS", help="as paper.fair's")
    parser.set_defaults(scorers=["cb"], classifier=None, rule=None, calibrate=None)  # for TrainedRun
    c_b = load_checkpoint(Path(parser.parse_args(argv).run, "scorer.pt"), "scorer")["settings"]
    return parse(parser, argv, {name: (c_b[name], row[-1]) for name, row in SCORER.items()})

def main(argv=None):
    """Train what is not trained, score the run's sets with each, print and write the tables."""
    args = read_flags(argv)
    run = TrainedRun(args)
    settings = run.settings()
    sets = chosen_sets(args, run)
    data = few(run.data, args.per_class, args.seed) if args.per_class else run.data

    # the scorers f(x, x', y)
    means = class_means(data)
    scorers = {
        "SSIM to synthesis": lambda x, x_fake, y: ssim(x, x_fake),
        "SSIM to class mean": lambda x, x_fake, y: ssim(x, means[y]),
        "SSIM to x at half its size": lambda x, x_fake, y: ssim(x, half_size(x))}
    if args.verifier:
        second, _, _ = load_classifier(args.verifier, None, args.device, run.classes)
        scorers["second classifier"] = lambda x, x_fake, y: second(x).gather(1, y[:, None])[:, 0]
        settings["second classifier"] = second.settings
    makers = stand_ins(run.G, means)
    for name in args.on:
        title = f"{'C_b' if args.scorer == 'cb' else args.scorer} on {name}"
        scorers[title], settings[title] = train_on(name, makers[name], args, run, data)

    tables = tables_with_energy(run, run.G, scorers, sets)
    parts = ["limits", args.scorer if args.scorer != "cb" else None, args.per_class,
             None if args.dev is None else "dev"]
    name = "-".join(str(part) for part in parts if part)
    write_json(Path(args.run, f"{name}.json"), dict(provenance(), settings=settings, **tables))

if __name__ == "__main__":
    run_script(main)
