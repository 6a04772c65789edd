"""What limits the detector: stand-ins for x', and a second classifier in C_b's place.

    python -m paper.limits --run RUN --steps 4000 --bf16 --ood FOLDER     # writes RUN/limits.json
    python -m paper.limits ... --verifier RUN2                            # RUN2/classifier.pt, too

Each C_b trains like the run's own, for --steps, into RUN/limits/: on x' = G(x_m, y), on x' = x, on
the mean training image of class y, and on x' = 0, which leaves it x and y alone. SSIM compares x
with x', with that mean image, and with x itself at half its size. After an interruption add
--resume. Fisher's method joins each with the classifier's energy alone.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from evaluate import (LABELINGS, add_joint, format_table, gather_sets, make_scorers, provenance,
                      score_set, tabulate, write_json)
from moodcat import SCORERS, ImageMask, MoodCat, fold, ssim
from paper.common import Run
from train_gen import Parser, run_script, to_float
from train_scorer import load_classifier, train_scorer

class StandIn(nn.Module):
    """In the generator's place: x' is images[y] (K, C, S, S), or, if there are none, x_m."""

    def __init__(self, settings, images):
        super().__init__()
        self.settings, self.images = settings, nn.Parameter(images, requires_grad=False)

    def forward(self, x_m, y):
        return (self.images[y] if len(self.images) else x_m), None, None

def stand_ins(G, train, settings):
    """{name: (what makes x', share of the area that the mask removes)}."""
    x, y, K = train.x[~train.held], train.y[~train.held], len(settings["classes"])
    means = torch.stack([to_float(x[y == k]).mean(0) for k in range(K)])
    return {"synthesis": (G, settings["mask_ratio"]), "x": (StandIn(G.settings, means[:0]), 0.0),
            "class mean": (StandIn(G.settings, means), settings["mask_ratio"]),
            "nothing": (StandIn(G.settings, 0 * means), settings["mask_ratio"])}

def on(made, scorer, mask):
    """The scorer f(x, x', y), a net, on the x' that `made` makes."""
    fold(scorer), fold(made)
    return lambda x, x_fake, y: scorer(x, made(mask(x)[0], y)[0], y)

def main(argv=None):
    """Train what is not trained, score the run's sets with each, print and write the tables."""
    parser = Parser(__doc__, steps="of each C_b [as many as the run's own]")
    add = parser.add_argument
    add("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    add("--verifier", metavar="RUN", help="the run of a second classifier of the same classes")
    parser.set_defaults(scorers=["cb"], classifier=None)  # for Run
    args = parser.parse_args(argv)
    run = Run(args)
    G, about, train, classifier = run.G, run.about, run.train, run.classifier
    own, sets = run.trained["cb"]["settings"], gather_sets(args, about, {})
    if len(sets) == 1:
        parser.error("no image is OOD: name OOD sets after --ood")
    scorers, content = {}, {name: {} for name in LABELINGS}
    if args.verifier:
        second, _, _ = load_classifier(args.verifier, None, args.device, run.classes)
        scorers["second classifier"] = lambda x, x_fake, y: second(x).gather(1, y[:, None])[:, 0]
    made_by = stand_ins(G, train, about["settings"])
    mean = lambda x, y: made_by["class mean"][0](x, y)[0]
    half = lambda x: F.interpolate(F.avg_pool2d(x, 2), x.shape[2:], mode="bilinear")
    scorers.update({"SSIM to synthesis": SCORERS["ssim"](None, classifier),
                    "SSIM to class mean": lambda x, x_fake, y: ssim(x, mean(x, y)),
                    "SSIM to x at half its size": lambda x, x_fake, y: ssim(x, half(x))})
    for name, (made, ratio) in made_by.items():
        at = argparse.Namespace(**{**vars(args), "run": str(Path(args.run, "limits", name))})
        settings = dict(own, seed=args.seed, bf16=args.bf16, mask_ratio=ratio,
                        steps=args.steps or own["steps"], mirror=own.get("mirror", False),
                        generator=own["generator"] if made is G else name)
        train_scorer(at, "scorer", settings, train, made.to(args.device))
        nets, _ = make_scorers(["cb"], at, dict(id=settings["generator"]), classifier)
        mask = ImageMask(ratio, args.seed)
        scorers[f"C_b on {name}"] = on(made, nets["cb"].to(args.device), mask)
    detector = MoodCat(G, scorers)
    held = score_set(detector, classifier, train.x[train.held], train.y[train.held], "held-out")
    scored = {name: score_set(detector, classifier, x, y, name) for name, (x, y, _) in sets.items()}
    for name in scorers:
        joint = {key: dict(columns) for key, columns in scored.items()}
        add_joint(joint, held, [name])
        for labels in LABELINGS:
            rows = tabulate(joint, ["EBO", name, "fisher with energy"], labels)
            content[labels].update({"EBO": rows["EBO"], name: rows[name],
                                    f"{name}, with energy": rows["fisher with energy"]})
    for labels, table in content.items():
        print(f"\n{labels}\n{format_table(table)}")
    write_json(Path(args.run, "limits.json"), dict(content, about=dict(
        provenance(), settings=about["settings"], steps=args.steps or own["steps"])))

if __name__ == "__main__":
    run_script(main)
