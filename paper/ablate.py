"""Ablations of one trained run: which scorers (Table 4), mask styles (Table 11), more masks.

    python -m paper.ablate --run runs/digits                 # writes RUN/ablation.json
    python -m paper.ablate --run runs/digits --subsets       # Table 4 alone, from RUN/scores.csv
    python -m paper.ablate --run runs/cifar10 --ood cifar100 --only "mask none" "mask shuffle"
"""

from functools import partial
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluate import TrainedRun, format_table, gather_sets, make_parser, provenance, write_json
from moodcat import ImageMask, joint_scores
from paper.common import all_tables, read_json, read_scores, score_run
from train_gen import run_script

SIDE = 4  # of the squares of two styles, in pixels; 8 x 8 squares at 32 px, as the authors'

# --- Table 11's masks: f(x, i) -> (x_m, M), as MoodCat takes them; chance follows i alone --------
def no_mask(x, i=0):
    """Nothing is removed."""
    return x, torch.zeros_like(x[:, :1], dtype=torch.bool)

def fixed_square(x, i=0, ratio=0.3):
    """A centred square of that share of the area."""
    _, mask = no_mask(x)
    H, W = x.shape[2:]
    h = round(H * ratio**0.5)
    w = round(W * ratio**0.5)
    top = (H - h) // 2
    left = (W - w) // 2
    mask[:, :, top:top + h, left:left + w] = True
    return x.masked_fill(mask, 0.0), mask

def grid_order(x, i):
    """A random order of the n squares (n,), and how many lie in a column and a row. Raises
    ValueError."""
    H, W = x.shape[2:]
    if H % SIDE or W % SIDE:
        raise ValueError(f"this mask needs sides that are multiples of {SIDE}")
    grid = H // SIDE, W // SIDE
    order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(i))
    return order.to(x.device), grid

def random_squares(x, i=0, ratio=0.3):
    """That share of the squares is removed."""
    order, grid = grid_order(x, i)
    squares = (order < round(ratio * len(order))).float().view(1, 1, *grid)
    mask = F.interpolate(squares, x.shape[2:]).bool().repeat(len(x), 1, 1, 1)
    return x.masked_fill(mask, 0.0), mask

def shuffled_squares(x, i=0):
    """The squares change places; nothing is removed."""
    order, _ = grid_order(x, i)
    squares = F.unfold(x, SIDE, stride=SIDE)                             # (B, C SIDE^2, n)
    return F.fold(squares[:, :, order], x.shape[2:], SIDE, stride=SIDE), no_mask(x)[1]

STYLES = {
    "none": no_mask,
    "fixed 0.1": partial(fixed_square, ratio=0.1),
    "fixed 0.3": fixed_square,
    "patch 0.3": random_squares,
    "shuffle": shuffled_squares,
    "random": ImageMask(),
    "random 0.3 to 0.5": ImageMask((0.3, 0.5))}

# {title: (how many masks an image, mask or None, the run's own)}
VARIANTS = {f"mask {name}": (1, mask) for name, mask in STYLES.items()}
VARIANTS.update({f"masks {n}": (n, None) for n in (8, 4, 2, 1)})  # 1 comes last, for Table 4

# --- Table 4: which scorers ----------------------------------------------------------------------
def add_subsets(scored, held_out, names):
    """To each Scored the joint scores of every subset of the scorers `names`, as "cb+ssim min-p"
    and so on, by the even half of held_out {scorer: (n,)}; one scorer alone is there already."""
    for n in range(2, len(names) + 1):
        for subset in combinations(names, n):
            reference = {name: held_out[name][::2] for name in subset}
            for s in scored.values():
                for rule, joint in joint_scores(s.scores, reference).items():
                    s.scores[f"{'+'.join(subset)} {rule}"] = joint

def main(argv=None):
    """Score the run under every variation, write RUN/ablation.json, print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--subsets", action="store_true", help="Table 4 alone, from RUN/scores.csv")
    parser.add_argument("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=list(VARIANTS),
                        default=list(VARIANTS), help="of %(choices)s [all]")
    args = parser.parse_args(argv)
    tables = {}
    if args.subsets:
        names = read_json(Path(args.run, "results.json"))["scorers"]
        scored = read_scores(args.run)
        held_out = {key: scored.pop(key) for key in list(scored) if key[0] == "held-out"}
        add_subsets(scored, held_out["held-out", "C(x)"].scores, names)
        found = all_tables(scored)
    else:
        run = TrainedRun(args)
        names = list(run.scorers)
        sets = gather_sets(args, run)
        for title in sorted(args.only, key=list(VARIANTS).index):
            _, scored, held_out = score_run(run, sets, *VARIANTS[title])
            add_subsets(scored, held_out["held-out", "C(x)"].scores, names)
            found = all_tables(scored)
            tables[title] = found["y = C(x)"]
            tables[f"{title}, oracle labels"] = found["oracle labels"]

    # Table 4's are of a single mask; what is in the file already and is not measured now stays
    if args.subsets or "masks 1" in args.only:
        tables.update({f"subsets, {protocol}": table for protocol, table in found.items()})
    for title, table in tables.items():
        print(f"\n{title}\n{format_table(table)}")
    path = Path(args.run, "ablation.json")
    before = read_json(path) if path.exists() else {}
    write_json(path, {**before, **provenance(), "scorers": names, **tables})

if __name__ == "__main__":
    run_script(main)
