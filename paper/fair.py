"""Every method alone and with energy, by one rule, beside the classifier's own features.

    python -m paper.fair --run runs/digits                          # writes RUN/fair.json
    python -m paper.fair --run runs/cifar10 --ood cifar100 --scorers cb ssim lpips-squeeze energy
    python -m paper.fair --run runs/cifar10 --dev [CLASS ...]       # chooses; no test image

What is joined with energy is joined as the detector joins its scorers, by Fisher's method; so is
every subset of the scorers ("cb+ssim fisher"). Against energy alone each row has a paired bootstrap
over the images: the gain in AUROC, 2.5% and 97.5%.
Mahalanobis: Lee et al. (2018), the last features alone. kNN: Sun et al. (2022). A program as
classifier shows no features, so these rows are absent.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evaluate import (TrainedRun, format_table, gather_sets, make_parser, provenance,
                      write_json)
from moodcat import RULES
from paper.ablate import add_subsets
from paper.common import add_energy, all_tables, score_run
from paper.develop import unknown_rows
from related.mood import mahalanobis
from train_gen import run_script, to_float

RESAMPLES = 1000
VIEW = "y = C(x)"

# --- Scores of the classifier's last features ----------------------------------------------------
def feature_net(classifier):
    """The classifier -> f, images (B, C, S, S) in [-1, 1] to what its last linear layer takes, (B,
    D); None where it has none."""
    if not isinstance(classifier, nn.Module):
        return None
    layers = [part for part in classifier.modules() if isinstance(part, nn.Linear)]
    if not layers:
        return None

    def features(x):
        found = []
        hook = layers[-1].register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]))
        classifier(x)
        hook.remove()
        return found[0]
    return features

@torch.no_grad()
def features(classifier, x):
    """uint8 images x (N, C, S, S) -> the classifier's features (N, D), or None."""
    f = feature_net(classifier)
    return f and torch.cat([f(to_float(part)) for part in x.split(256)]).double()

def nearest(train, test):
    """Minus the distance to the k-th nearest of train (N, D), both of length 1: test (M, D) ->
    (M,). k is 50 for 50,000 images, as in the paper, and in proportion."""
    k = max(1, round(len(train) / 1000))
    train = F.normalize(train)
    chunks = [torch.cdist(part, train).kthvalue(k).values for part in F.normalize(test).split(256)]
    return -torch.cat(chunks)

def add_features(classifier, data, images, scored):
    """To each Scored of {(set, labels)} the two scores of the images {set: uint8 (N, C, S, S)}."""
    x, y = data.training_images()
    train = features(classifier, x)
    if train is None:
        return
    for name, x in images.items():
        test = features(classifier, x)
        own = {"Mahalanobis": -mahalanobis(train, test, y, "shared"),
               "kNN": nearest(train, test)}
        for (title, _), s in scored.items():
            if title == name:
                s.scores.update({method: values.cpu() for method, values in own.items()})

# --- Joined with energy, and compared with it ----------------------------------------------------
def aurocs(inside, outside, counts):
    """AUROC of scores inside (N,) above outside (M,), ties count half, for each pair of counts (N,),
    (M,), how often each image is there -> (len(counts),)."""
    _, rank = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    ranks = rank.max() + 1
    found = []
    for many, others in counts:
        of_rank = np.bincount(rank[len(inside):], others, ranks)
        below = np.cumsum(of_rank) - of_rank / 2
        found.append(many @ below[rank[:len(inside)]] / (many.sum() * others.sum()))
    return np.array(found)

def as_arrays(s):
    """A Scored's scores as arrays."""
    return {method: values.double().numpy() for method, values in s.scores.items()}

def bootstrap(inside, outside, seed=0):
    """{method: (N,)} and {method: (M,)} of the same images -> {method: dict(gain, low, high)} in
    AUROC over energy, with 95% of the resamples of images between low and high."""
    rng = np.random.default_rng(seed)
    n = len(inside["energy"])
    m = len(outside["energy"])
    counts = [(np.ones(n), np.ones(m))]  # the images themselves, then the resamples
    for _ in range(RESAMPLES):
        counts.append((np.bincount(rng.integers(n, size=n), minlength=n),
                       np.bincount(rng.integers(m, size=m), minlength=m)))
    base = aurocs(inside["energy"], outside["energy"], counts)
    found = {}
    for method in inside:
        gains = aurocs(inside[method], outside[method], counts) - base
        low, high = np.quantile(gains[1:], [0.025, 0.975]).tolist()
        found[method] = dict(gain=float(gains[0]), low=low, high=high)
    return found

def add_others(run, sets, scored, held_out):
    """To the Scored of the sets and of the held-out images Mahalanobis and kNN, then every method
    with energy, and every subset of the scorers; what has energy already is not given it twice."""
    images = {name: x for name, (x, _, _) in sets.items()}
    every = scored | held_out
    add_features(run.classifier, run.data, {**images, "held-out": run.held_out[0]}, every)
    reference = held_out["held-out", "C(x)"].scores
    methods = [name for name in reference if "energy" not in name and name not in RULES]
    add_energy(every, reference, methods)
    add_subsets(every, reference, run.scorers)

# --- What is compared ----------------------------------------------------------------------------
def development_sets(run, classes):
    """{set: (images, labels, names)} without a test image: the odd half of the held-out images, for
    the even half makes p-values, and training images of these unknown classes, [] = all. Raises
    ValueError."""
    x, y, names = run.held_out
    rows = unknown_rows(run.data.source, run.classes, classes or None)
    nobody = torch.full((len(rows),), -1, device=x.device)
    return {"in-distribution": (x[1::2], y[1::2], names[1::2]),
            "unknown": (run.data.unknown[rows.to(x.device)], nobody, rows.tolist())}

def chosen_sets(args, run):
    """What --ood and --dev say to score: {set: (images, labels, names)}. Raises OSError or ValueError."""
    sets = gather_sets(args, run) if args.dev is None else development_sets(run, args.dev)
    if len(sets) == 1:
        raise ValueError("no image is OOD: name OOD sets after --ood")
    return sets

def main(argv=None):
    """Score the run, write RUN/fair.json or RUN/fair-dev.json, print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ood", nargs="+", default=[], metavar="SET", help="as evaluate.py's")
    parser.add_argument("--dev", nargs="*", metavar="CLASS",
                        help="held-out images against training images of unknown classes [all]")
    args = parser.parse_args(argv)
    run = TrainedRun(args)
    sets = chosen_sets(args, run)
    _, scored, held_out = score_run(run, sets, args.masks)

    add_others(run, sets, scored, held_out)
    tables = all_tables(scored)
    inside = as_arrays(scored["in-distribution", "C(x)"])
    print(f"{VIEW}\n{format_table(tables[VIEW])}")
    gains = {method: {} for method in inside}
    for name in list(sets)[1:]:
        print(f"\nAUROC above energy's on {name}, in points, 95% of {RESAMPLES} resamples:")
        for method, row in bootstrap(inside, as_arrays(scored[name, "C(x)"])).items():
            gains[method][name] = row
            print("{:34s}{:+8.2f}{:+8.2f}{:+8.2f}".format(
                method, *(100 * row[k] for k in ("gain", "low", "high"))))
    name = "fair.json" if args.dev is None else "fair-dev.json"
    write_json(Path(args.run, name), dict(
        provenance(), settings=run.settings(), n={k: len(x) for k, (x, _, _) in sets.items()},
        gains=gains, **run.scoring(), **tables))

if __name__ == "__main__":
    run_script(main)
