"""Scores inside the mask alone, the mean over several masks: there the paper looks for the mismatch.

    python -m paper.inside --run runs/digits --masks 8                 # writes RUN/inside.json
    python -m paper.inside --run runs/digits --masks 8 --dev [CLASS ...]

x' is pasted into the hole of x, so that any metric of x and x' sees what differs there: l1 (a mean
over the pixels that differ), SSIM, and the distance of the classifier's last features. Beside them
the same of the whole x'. Joined with energy by Fisher's method. --dev: as paper.fair's.
"""

from pathlib import Path

import torch
from torch import nn

from evaluate import TrainedRun, format_table, make_parser, provenance, write_json
from moodcat import RULES, similarity
from paper.common import add_energy, all_tables, score_run
from paper.fair import chosen_sets, feature_net
from train_gen import run_script

class Pasted(nn.Module):
    """G, but outside the hole x' is x. x_m is 0 in the hole alone: no uint8 is 127.5."""
    def __init__(self, G):
        super().__init__()
        self.G = G
        self.settings = G.settings

    def forward(self, x_m, y):
        x_fake, mu, logvar = self.G(x_m, y)
        return torch.where(x_m == 0, x_fake, x_m), mu, logvar

def l1(x, x_fake, y):
    """Minus the mean difference over the pixels that differ, (B, C, S, S) twice -> (B,)."""
    differ = (x != x_fake).sum((1, 2, 3)).clamp(min=1)
    return -(x - x_fake).abs().sum((1, 2, 3)) / differ

def distances(classifier):
    """{name: f(x, x', y) -> (B,)}, higher = more alike."""
    found = {"l1": l1, "SSIM": similarity}
    f = feature_net(classifier)
    if f:
        found["features"] = lambda x, x_fake, y: -(f(x) - f(x_fake)).norm(dim=1)
    return found

def main(argv=None):
    """Score the run's sets both ways, print and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    parser.add_argument("--dev", nargs="*", metavar="CLASS", help="as paper.fair's")
    args = parser.parse_args(argv)
    args.scorers = ["energy"]  # the others are below
    run = TrainedRun(args)
    sets = chosen_sets(args, run)

    # the same scores of x' and of what is in the hole
    energy = run.scorers["energy"]
    makers = {"everywhere": run.G, "in the hole": Pasted(run.G)}
    every = {}
    for where, run.G in makers.items():
        alone = distances(run.classifier)
        run.scorers = {f"{name} {where}": f for name, f in alone.items()} | {"energy": energy}
        _, scored, held_out = score_run(run, sets, args.masks)
        add_energy(scored, held_out["held-out", "C(x)"].scores, [*run.scorers][:-1])
        for key, s in scored.items():
            for rule in RULES:  # over what lies everywhere, or in the hole: one name for two scores
                del s.scores[rule], s.scores[f"{rule} with energy"]
            every.setdefault(key, s).scores.update(s.scores)
    tables = all_tables(every)
    print(format_table(tables["y = C(x)"]))
    name = "inside.json" if args.dev is None else "inside-dev.json"
    write_json(Path(args.run, name), dict(
        provenance(), settings=run.settings(), masks=args.masks, **tables))

if __name__ == "__main__":
    run_script(main)
