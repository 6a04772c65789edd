"""Out-of-distribution detection with a trained run, and its numbers. Trains nothing.

    python evaluate.py                                           # digits, after the other two
    python evaluate.py --run runs/cifar10 --ood cifar100 svhn dtd FOLDER
    python evaluate.py --run runs/cifar10 --scorers cb lpips-squeeze
    python evaluate.py --run runs/cifar10 --scood ROOT           # the SC-OOD benchmark
    python evaluate.py --run runs/cifar10 --images my_photos     # verdicts on your own pictures
    python evaluate.py --bench                                   # parameters, MACs, images per second
    python evaluate.py --tables runs/tables                      # the paper's tables from many runs

In-distribution: the run's test split. OOD: the test images of the other classes ("unknown"), when
there are any, and the sets after --ood. The headline uses y = C(x); the authors' protocol (true
labels for in-distribution, random labels for OOD images) follows under its own name. Ranks, shares
and threshold of the cascade are fixed on held-out training images: no test image chooses anything.
Writes into RUN, or --out: detector.pt, results.json, scores.csv (all scores of each image, from which
every table follows), panels.png, masks.png, histograms.png, roc.png, curves.png.
"""

import csv
import itertools
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import train_gen
import train_scorer
from moodcat import (DISTS, LPIPS, BinaryScorer, Energy, MoodCat, cascade, fit_cascade, folded,
                     in_half, load_checkpoint, load_weights, random_mask, save_checkpoint, ssim)
from train_gen import (MASK_RATIO, RANK, WORLD, Parser, Split, build, download, fit_image,
                       image_files, kind_of, read_files, read_log, run_script, to_float, write_text)
from train_scorer import build_scorer, load_classifier, load_run, make_classifier, predict

# ---------------------------------------------------------------------------------------------
# Settings

SCORERS = dict(digits=["cb", "ssim"], colour=["cb", "lpips", "dists"])  # colour: the paper's
TPR = 0.95                   # share of in-distribution images to accept
DEV_UNKNOWN = 2000           # --dev takes that many OOD images at the most, evenly spaced
ODIN_TEMPERATURE = 1000.0    # its paper's defaults; its step of 0.0014 is for images in [0, 1], ...
ODIN_STEP = 2 * 0.0014       # ... ours span twice that
# which labels the two sides are scored under; "oracle": true in-distribution, random for OOD
LABELINGS = dict(predicted_labels=("", ""),             # y = C(x), the headline
                 oracle_labels=("oracle ", "oracle "),  # the authors' code
                 true_in_distribution=("oracle ", ""))  # the truth where there is one, else C(x)
CALIBRATION = ("held-out", "second guess")              # sets of scores.csv that no table reports
BENCH_SECONDS, BENCH_REPEATS, BENCH_MATRIX = 2, 3, 4096  # for each line of --bench, at the least
BENCH_BATCHES = {"generator iteration": [96], "C_b iteration": [96],
                 "inference": [1, 4, 16, 64, 256, 1024]}
# GFLOP an image of the authors' steps, by torch's counter: doing less for the same result is speed
COUNTED = {"generator iteration": 8.1, "C_b iteration": 2.06, "inference": 0.749}
COLUMNS = dict(fpr95="FPR@TPR95", auroc="AUROC", aupr_in="AUPR-In", aupr_out="AUPR-Out",
               accuracy="accuracy")

# ---------------------------------------------------------------------------------------------
# Metrics (section 4.2) and baselines


def ood_metrics(id_scores, ood_scores):
    """fpr95, auroc, aupr_in, aupr_out as fractions; scores (N,) and (M,), higher = in-distribution,
    which is the positive class (section 4.2). The threshold of FPR@TPR95 is the k-th largest
    in-distribution score, k = floor(0.95 N), and a score at it is accepted, so that a constant score
    has an FPR of 1. AUPR is the trapezoid under the precision-recall curve. Raises ValueError for
    empty or non-finite scores."""
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score
    id_scores, ood_scores = (np.asarray(s, dtype=np.float64).ravel() for s in (id_scores, ood_scores))
    scores = np.concatenate([id_scores, ood_scores])
    if not len(id_scores) or not len(ood_scores) or not np.isfinite(scores).all():
        raise ValueError("metrics need finite scores of at least one image on each side")
    threshold = np.sort(id_scores)[::-1][max(1, math.floor(0.95 * len(id_scores) + 1e-9)) - 1]
    is_id = np.r_[np.ones(len(id_scores)), np.zeros(len(ood_scores))]

    def aupr(positive, score):
        precision, recall, _ = precision_recall_curve(positive, score)
        return auc(recall, precision)

    return dict(fpr95=float((ood_scores >= threshold).mean()),
                auroc=float(roc_auc_score(is_id, scores)),
                aupr_in=float(aupr(is_id, scores)), aupr_out=float(aupr(1 - is_id, -scores)))


def baselines(classifier, x, logits):
    """MSP, ODIN and energy (EBO) of float images x (B, C, S, S) with logits (B, K), higher =
    in-distribution: {name: (B,)}."""
    scores = {"MSP": logits.softmax(1).max(1).values, "EBO": logits.logsumexp(1)}
    with torch.enable_grad():  # ODIN steps towards a higher softmax, then looks at it
        x = x.clone().requires_grad_(True)
        top = (classifier(x) / ODIN_TEMPERATURE).log_softmax(1).max(1).values.sum()
    if top.requires_grad:  # a program without gradients has no ODIN
        step = torch.autograd.grad(top, x)[0].sign()
        moved = classifier(x.detach() + ODIN_STEP * step) / ODIN_TEMPERATURE
        scores["ODIN"] = moved.softmax(1).max(1).values
    return scores


# ---------------------------------------------------------------------------------------------
# What to score


def make_scorers(names, run, settings, device, classifier):
    """The scorers that --scorers names, and the steps of those that were trained. Raises OSError or
    ValueError."""
    scorers, steps = {}, {}
    for name in names:
        if name in ("cb", "cb_extra"):
            kind = name.replace("cb", "scorer")
            path = Path(run, f"{kind}.pt")
            if not path.exists():
                raise OSError(f"{path} does not exist: run train_scorer.py --run {run} first"
                              + ", then with --extra" * (name == "cb_extra"))
            saved = load_checkpoint(path, kind, device)
            differ = [k for k in ("classes", "generator_id") if saved["settings"][k] != settings[k]]
            if differ:
                raise ValueError(f"{path} was trained with other {' and '.join(differ)} than "
                                 "generator.pt: delete it and run train_scorer.py again")
            if saved["best"]["weights"] is None:
                raise ValueError(f"{path} stopped before its first look at held-out pairs: go on with "
                                 "train_scorer.py --resume")
            scorers[name], steps[name] = load_weights(
                BinaryScorer(len(settings["classes"]), settings["ch"], settings["channels"]),
                saved["best"]["weights"], path), saved["step"]
        elif name == "ssim":
            scorers[name] = ssim
        elif name == "dists":
            scorers[name] = DISTS()
        elif name == "energy":
            scorers[name] = Energy(classifier)
        elif name.split("-")[0] == "lpips":
            scorers[name] = LPIPS(name.partition("-")[2] or "vgg")
        else:
            raise ValueError(f"no scorer {name!r}: cb, cb_extra, lpips, lpips-alex, lpips-squeeze, "
                             "dists, ssim, energy")
    return scorers, steps


# the 50 animal classes of CIFAR-100 (its ten animal superclasses, people among them)
ANIMALS = """aquarium_fish baby bear beaver bee beetle boy butterfly camel caterpillar cattle chimpanzee
    cockroach crab crocodile dinosaur dolphin elephant flatfish fox girl hamster kangaroo leopard lion
    lizard lobster man mouse otter porcupine possum rabbit raccoon ray seal shark shrew skunk snail
    snake spider squirrel tiger trout turtle whale wolf woman worm""".split()


def animals(name):
    """CIFAR+N of Table 3, "cifar+50" or "cifar+10:SPLIT": names of N classes of CIFAR-100."""
    if name == "cifar+50":
        return ANIMALS
    if not re.fullmatch("cifar[+]10:[0-4]", name):
        raise ValueError(f"no set {name!r}: cifar+50 and cifar+10:0 to cifar+10:4, a split each")
    return sorted(np.random.default_rng(int(name[-1])).choice(ANIMALS, 10, replace=False).tolist())


def load_ood(name, size, channels):
    """An OOD set by name or folder -> uint8 (N, C, S, S), a name for each image."""
    from torchvision import datasets
    if name in ("cifar10", "cifar100"):
        images = download(datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100, train=False)
    elif name == "svhn":
        images = download(datasets.SVHN, split="test")
    elif name == "dtd":
        images = torch.utils.data.ConcatDataset(
            [download(datasets.DTD, split=split) for split in ("train", "val", "test")])
    elif name.startswith("cifar+"):
        images = download(datasets.CIFAR100, train=False)
        wanted = {images.class_to_idx[c] for c in animals(name)}
        images = [pair for pair in images if pair[1] in wanted]
    else:
        files = image_files(name)
        return read_files(files, channels, size), files
    x = np.stack([fit_image(image, channels, size) for image, _ in images])
    return torch.from_numpy(x), range(len(x))


def read_scood(root, settings):
    """The SC-OOD benchmark: {set: (uint8 images (N, C, S, S), labels (N,), their names)} of ROOT/images
    by the lists ROOT/imglist/benchmark_*/test_<set>.txt. A line is a path, a space and a JSON object
    whose "sc_label" is -1 for OOD, else the class that the image really shows. Raises OSError or
    ValueError."""
    K, found = len(settings["classes"]), sorted(Path(root, "imglist").glob("benchmark_*"))
    # cifar10's labels mean nothing to a run of another number of classes
    folders = [f for f in found if f.name == f"benchmark_cifar{K}"] or [
        f for f in found if not re.fullmatch("benchmark_cifar[0-9]+", f.name)]
    lists = sorted(folders[0].glob("test_*.txt")) if len(folders) == 1 else []
    if not lists:
        raise OSError(f"{root} must hold images/ and, for {K} classes, lists imglist/benchmark_cifar{K}/"
                      "test_*.txt, or those of one benchmark of another name")
    sets = {}
    for file in lists:
        names, labels = [], []
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                name, _, rest = line.decode().partition(" {")
                label = json.loads("{" + rest)["sc_label"]
                if type(label) is not int or label not in range(-1, K):
                    raise ValueError(f"sc_label {label} is not in -1 to {K - 1}")
            except (ValueError, KeyError) as error:
                raise ValueError(f'{file}, line {number}: {error}; a line is: PATH {{"sc_label": 3}}'
                                 ) from error
            names.append(name)
            labels.append(label)
        if not labels:
            raise ValueError(f"{file} is empty")
        if min(labels) >= 0:
            print(f"{file.name} lists no OOD image; in-distribution is the run's own test split")
            continue
        x = read_files([Path(root, "images", name) for name in names], settings["channels"],
                       settings["image_size"])
        sets[file.stem.removeprefix("test_")] = (x, torch.tensor(labels), names)
    return sets


def gather_sets(args, settings, train):
    """What to report on: {set: (uint8 images, labels, their names)}, "in-distribution" first; label -1
    = OOD, otherwise the class. Raises OSError or ValueError."""
    if args.dev:
        rows = torch.nonzero(train.held)[1::2, 0]  # the even ones chose C_b's checkpoint
        sets = {"in-distribution": (train.x[rows], train.y[rows], train.names[rows.cpu()])}
        step = math.ceil(len(train.unknown) / DEV_UNKNOWN) or 1
        unknown, names = train.unknown[::step], train.unknown_names[::step]
    else:
        test = Split(settings, "test", args.device)
        sets = {"in-distribution": (test.x, test.y, test.names)}
        unknown, names = test.unknown, test.unknown_names
    ood = lambda x: torch.full((len(x),), -1)
    more = [("unknown", (unknown, ood(unknown), names))] if len(unknown) else []
    for name in args.ood:
        x, names = load_ood(name, settings["image_size"], settings["channels"])
        key = name.partition(":")[0] if name.startswith("cifar+") else "/".join(Path(name).parts[-2:])
        more.append((key, (x, ood(x), names)))
    more += read_scood(args.scood, settings).items() if args.scood else []
    for key, images in more:
        if key in (*sets, "mean", "std", *CALIBRATION):
            raise ValueError(f"there is a set {key!r} already: rename a folder or a list")
        sets[key] = images
    return sets


# ---------------------------------------------------------------------------------------------
# Scores of each image, and what follows from them


def score_set(detector, classifier, x, labels, title, batch):
    """Everything about one set of uint8 images x (N, C, S, S) with labels (N,), -1 = OOD: label,
    prediction and second guess, each method's score under y = C(x), and each scorer's under the
    oracle label (the truth, random for OOD): {column: (N,)} on the CPU. Of several processes each
    scores its share."""
    labels = labels.cpu()
    K = detector.generator.settings["num_classes"]
    random = torch.randint(K, labels.shape, generator=torch.Generator().manual_seed(0))
    oracle = torch.where(labels >= 0, labels, random)
    rows = torch.arange(max(len(x), WORLD)).fmod(len(x))[RANK::WORLD]
    scores, start = {}, time.time()
    for i in range(0, len(rows), batch):
        own = rows[i:i + batch]
        chunk, y = x[own.to(x.device)].to(detector.device), oracle[own]
        images, logits = to_float(chunk), predict(classifier, chunk, K)
        guesses = logits.topk(2).indices
        part = dict(prediction=guesses[:, 0], second=guesses[:, 1],
                    **baselines(classifier, images, logits), **detector.score(images, guesses[:, 0]))
        part.update({f"oracle {name}": s for name, s in detector.score(images, y).items()})
        for k, v in part.items():
            scores.setdefault(k, torch.empty(len(rows), dtype=v.dtype))[i:i + batch] = v.detach()
        done, spent = min(WORLD * (i + len(own)), len(x)), time.time() - start
        if RANK == 0 and (sys.stderr.isatty() or done == len(x)):
            print(f"{chr(13) if sys.stderr.isatty() else ''}{title} {done}/{len(x)} images "
                  f"{done / spent:.0f}/s {(len(x) - done) * spent / done / 60:.1f} min left",
                  end="\n" if done == len(x) else "", file=sys.stderr, flush=True)
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, scores)
        for k, merged in scores.items():
            scores[k] = merged.new_empty(max(len(x), WORLD))
            for rank, share in enumerate(shares):
                scores[k][rank::WORLD] = share[k]
    return dict(label=labels, **{k: s[:len(x)] for k, s in scores.items()})


def add_cascades(scored, held, wrong, names):
    """To each set of scores the cascade of every subset of two scorers and more (Table 4), under y =
    C(x) and under oracle labels, as columns "a+b" and, for all, "cascade". held, wrong: the held-out
    scores that fit them. Returns the calibration of "cascade" and the subsets, {title: column}."""
    pick = lambda scores, subset, prefix="": {name: scores[prefix + name] for name in subset
                                              if prefix + name in scores}
    columns = {name: name for name in names}
    for size in range(1, len(names) + 1):
        for subset in itertools.combinations(names, size):
            if size == 1 < len(names):
                continue  # one scorer's cascade has its order
            calibration = fit_cascade(pick(held, subset), pick(wrong, subset), TPR)
            key = "cascade" if size == len(names) else "+".join(subset)
            for s in scored.values():
                for prefix in ("", "oracle "):
                    s[prefix + key] = cascade(pick(s, subset, prefix), calibration)
            columns["+".join(subset)] = key
    return calibration, columns


def tabulate(scored, methods, labeling):
    """{method: {set: metrics}} for {method: column}, with rows "mean" and "std" (ddof 1) where there
    are several sets. In-distribution images inside an OOD set join the test images."""
    inside, outside = LABELINGS[labeling]
    test, table = scored["in-distribution"], {}
    for method, column in methods.items():
        rows = {}
        for name, s in scored.items():
            if name == "in-distribution":
                continue
            ood = s["label"] < 0
            known = torch.cat([test["label"], s["label"][~ood]])
            predicted = torch.cat([test["prediction"], s["prediction"][~ood]])
            metrics = ood_metrics(torch.cat([test[inside + column], s[inside + column][~ood]]),
                                  s[outside + column][ood])
            rows[name] = dict(metrics, accuracy=(known == predicted).double().mean().item())
        if len(rows) > 1:
            values = {c: [row[c] for row in rows.values()] for c in COLUMNS}
            rows["mean"] = {c: float(np.mean(v)) for c, v in values.items()}
            rows["std"] = {c: float(np.std(v, ddof=1)) for c, v in values.items()}
        table[method] = rows
    return table


def format_table(table):
    """The rows of Table 1, in percent."""
    width = max(len(s) for rows in table.values() for s in rows) + 2
    lines = [f"{'method':15s}{'OOD':{width}s}" + "".join(f"{c:>11s}" for c in COLUMNS.values())]
    for method, rows in table.items():
        for i, (name, row) in enumerate(rows.items()):
            lines.append(f"{method if i == 0 else '':15s}{name:{width}s}"
                         + "".join(f"{100 * row[c]:11.2f}" for c in COLUMNS))
    return "\n".join(lines)


def source_revision():
    """The commit of this checkout, "+" when it has changes; "unknown" outside git."""
    here = Path(__file__).resolve().parent
    if not shutil.which("git"):
        return "unknown"
    git = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
    head = git("rev-parse", "--short", "HEAD")
    return head.stdout.strip() + "+" * bool(git("status", "--porcelain", "-uno").stdout) \
        if head.returncode == 0 else "unknown"


def write_csv(path, scored, names, classes):
    """One line an image: set, image, classes (label, prediction, second guess), every score."""
    columns = list(scored["in-distribution"])
    named = dict(label=lambda v: classes[v] if v >= 0 else "OOD", prediction=lambda v: classes[v],
                 second=lambda v: classes[v])
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "image", *columns])
        for key, scores in scored.items():
            values = [map(named.get(c, repr), scores[c].tolist()) if c in scores else
                      itertools.repeat("") for c in columns]
            writer.writerows(zip(itertools.repeat(key), names[key], *values))
    temporary.replace(path)


def pyplot():
    """matplotlib without a screen; imported when there is something to draw."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_grids(path, grids):
    """A picture of grids: for each a title, {row name: images (n, C, S, S) in [-1, 1]} and n column
    names."""
    plt = pyplot()
    height = sum(len(rows) * 0.7 + 0.6 for _, rows, _ in grids)
    fig, axes = plt.subplots(len(grids), 1, figsize=(8, height), squeeze=False)
    for ax, (title, rows, names) in zip(axes[:, 0], grids):
        framed = (torch.nn.functional.pad(row, (1, 1, 1, 1), value=1.0) for row in rows.values())
        image = torch.cat([torch.cat(list(row), 2) for row in framed], 1)  # side by side
        ax.imshow(((image.cpu() + 1) / 2).permute(1, 2, 0).numpy().squeeze(), cmap="gray", vmin=0,
                  vmax=1)
        side = image.shape[2] / len(names)
        ax.set_xticks([side * (i + 0.5) for i in range(len(names))], names)
        ax.set_yticks([side * (i + 0.5) for i in range(len(rows))], list(rows))
        ax.set_frame_on(False)
        ax.tick_params(length=0, labelsize=8)
        ax.set_title(title, fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_panel(path, blocks, detector, classes):
    """Figures 5 to 8: for each (title, uint8 images, labels), input, masked and synthesis."""
    grids = []
    for title, x, y in blocks:
        if len(x):
            x, y = to_float(x).to(detector.device), y.to(detector.device)
            x_m, x_fake = detector.synthesise(x, y)
            grids.append((title, dict(input=x, masked=x_m, synthesis=x_fake),
                          [classes[c] for c in y.tolist()]))
    draw_grids(path, grids)


def draw_masks(path, G, inside, outside, y, classes):
    """Figure 4: an in-distribution and an OOD image, uint8 (C, S, S) each, synthesised as class y
    under every mask style."""
    styles = {"input": ("none", 0), "without": ("none", 0), "fixed, 0.1": ("fixed", 0.1),
              "fixed, 0.3": ("fixed", 0.3), "patches, 0.3": ("patch", 0.3), "shuffled": ("shuffle", 0),
              "random": ("random", MASK_RATIO)}
    grids = []
    for title, image in (("in-distribution", inside), ("OOD", outside)):
        x = to_float(image).to(next(G.parameters()).device)[None]
        x_m = torch.cat([random_mask(x, ratio, style, torch.Generator().manual_seed(0))[0]
                         for style, ratio in styles.values()])
        with torch.no_grad():
            x_fake = G(x_m, torch.full((len(x_m),), y, device=x.device))[0]
        x_fake[0] = 1  # under the input, nothing
        grids.append((f"{title}, as {classes[y]}", dict(masked=x_m, synthesis=x_fake), list(styles)))
    draw_grids(path, grids)


def draw_scores(run, sets, methods, threshold):
    """Histograms of each method's score by set, and ROC curves of all OOD sets together."""
    from sklearn.metrics import roc_curve
    plt = pyplot()
    fig, axes = plt.subplots(1, len(methods), figsize=(2.8 * len(methods), 2.6))
    for ax, method in zip(axes, methods):
        low, high = np.percentile(torch.cat([s[method] for s in sets.values()]), [1, 99])
        for name, s in sets.items():
            side = s[method][(s["label"] >= 0) == (name == "in-distribution")].numpy()
            ax.hist(side.clip(low, high), 30, range=(low, high), density=True, alpha=0.5, label=name)
        if method == "cascade":
            ax.axvline(threshold, color="k", lw=1)
        ax.set_title(method, fontsize=9)
        ax.set_yticks([])
        ax.tick_params(labelsize=7)
    axes[0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(Path(run, "histograms.png"), dpi=110)
    plt.close(fig)

    fig, ax = plt.subplots(figsize=(4, 4))
    for method in methods:
        is_ood = torch.cat([s["label"] for s in sets.values()]) < 0
        scores = torch.cat([s[method] for s in sets.values()])
        inside, outside = scores[~is_ood], scores[is_ood]
        fpr, tpr, _ = roc_curve(np.r_[np.ones(len(inside)), np.zeros(len(outside))],
                                np.r_[inside, outside])
        ax.plot(fpr, tpr, lw=1.2, label=method)
    ax.set(xlabel="OOD accepted", ylabel="in-distribution accepted")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(Path(run, "roc.png"), dpi=110)
    plt.close(fig)


def draw_curves(path, log):
    """The training log: losses of each phase, and the held-out AUROC between C_b's right and wrong
    labels, against images seen."""
    lines = [line for line in read_log(log) if "images" in line]  # earlier logs have none
    if not lines:
        return
    plt = pyplot()
    phases = list(dict.fromkeys(line["phase"] for line in lines))
    fig, axes = plt.subplots(1, len(phases), figsize=(4 * len(phases), 3), squeeze=False)
    for ax, phase in zip(axes[0], phases):
        own = [line for line in lines if line["phase"] == phase]
        for name in dict.fromkeys(k for line in own for k in line if k not in ("phase", "step", "images")):
            seen, values = zip(*((line["images"], line[name]) for line in own if name in line))
            ax.plot(seen, values, "o-" if name.startswith("pair") else "-", ms=3, lw=0.8, label=name)
        ax.set(title=phase, xlabel="images seen")
        ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------


def judge_images(args):
    """--images: a line and a panel column for each of the user's pictures."""
    shipped = Path(__file__).resolve().parent / "results" / "digits"
    if args.run == "runs/digits" and not Path(args.run).exists() and shipped.exists():
        print(f"there is no {args.run}: the detector in {shipped} judges")
        args.run, args.out = shipped, args.out or "."
    if not Path(args.run, "detector.pt").exists():
        raise OSError(f"{args.run}/detector.pt does not exist: run evaluate.py --run {args.run} first")
    classifier, about = load_classifier(Path(args.run, "classifier.pt"), args.device)
    detector = MoodCat.load(Path(args.run, "detector.pt"), args.device, classifier)
    classes = about["classes"]
    want = detector.generator.settings
    files = image_files(args.images)
    x = read_files(files, want["channels"], want["image_size"]).to(args.device)
    y = predict(classifier, x, want["num_classes"]).argmax(1)
    parts = [detector.score(to_float(xs), ys) for xs, ys in zip(x.split(1024), y.split(1024))]
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "cascade" not in scores:
        raise ValueError(f"{args.run}/detector.pt is not calibrated: run evaluate.py --run {args.run}")
    ood = (scores["cascade"] < detector.calibration["threshold"]).tolist()
    print("\t".join(["image", "prediction", *scores, "verdict"]))
    for i, file in enumerate(files):
        print("\t".join([file, classes[y[i]], *(f"{s[i]:.4f}" for s in scores.values()),
                         "OOD" if ood[i] else "in-distribution"]))
    path = Path(args.out or args.run, "images.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    order = scores["cascade"].argsort()[:12].cpu()
    draw_panel(path, [("your images, the most suspicious first", x[order], y[order].cpu())], detector,
               classes)
    print(f"{sum(ood)} of {len(files)} rejected; {path}")


def pick_blocks(sets, scored, threshold):
    """For draw_panel: a fair sample of every set (Figures 5 to 7), then the worst mistakes (8)."""
    fair, worst = [], []
    for name, (x, labels, _) in sets.items():
        s, inside = scored[name], name == "in-distribution"
        rows = torch.nonzero((labels >= 0) == inside)[:, 0].cpu()
        some = rows[np.random.default_rng(0).permutation(len(rows))[:10]]
        fair.append((name if inside else f"OOD: {name}", x[some], s["prediction"][some]))
        order = rows[s["cascade"][rows].argsort(descending=not inside)[:10]]
        order = order[(s["cascade"][order] < threshold) == inside]
        worst.append((f"{name}, rejected" if inside else f"OOD, accepted: {name}", x[order],
                      s["prediction"][order]))
    return fair + worst


# ---------------------------------------------------------------------------------------------
# Cost (Table 13) and speed


def seconds(work, device):
    """Median time of work() after a first call that warms up."""
    times = []
    for i in itertools.count():
        start = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times += [time.perf_counter() - start] * (i > 0)
        if i >= BENCH_REPEATS and sum(times) >= BENCH_SECONDS:
            return float(np.median(times))


def bench(args):
    """The paper's nets (ch = 32, 32 x 32 colour, 10 classes), untrained, since the weights change no
    cost: what each part costs, how fast the three steps are, how soon there is a first score."""
    torch.manual_seed(0)
    device, n = args.device, args.batch_size or 64
    nets = build(10, 32, 32, 3, True, device), build_scorer(10, 32, 3, device)
    (G, *_), (scorer, _) = nets
    detectors = {m: MoodCat(G, {"cb": scorer}, masks=m, bf16=args.bf16) for m in (1, 2, 4, 8)}
    resnet = make_classifier(10, 3, "small").to(device, memory_format=torch.channels_last).eval()
    x, y = torch.rand(1024, 3, 32, 32, device=device) * 2 - 1, torch.arange(1024, device=device) % 10
    cost = bench_parts(args, G, scorer, detectors, resnet, x[:n], y[:n])
    cost.update(bench_steps(args, *nets, detectors[1], x, y))
    spent = first_score(detectors[1], resnet, x, y, device)
    cost["first score"] = {"an image": dict(seconds=spent)}
    print(f"From starting Python to the first score of evaluate.py --images: {spent:.1f} s")
    if args.out:
        write_results(Path(args.out), dict(cost=cost, n=n), args)


def bench_parts(args, G, scorer, detectors, resnet, x, y):
    """Parameters, MACs by torch's counter and images per second of each part, of VGG16 and of the
    classifier, on images x (B, 3, 32, 32) with labels y (B,): {part: {"an image": cost}}."""
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import vgg16
    device, n = args.device, len(x)
    vgg = vgg16().features.to(device, memory_format=torch.channels_last).eval()
    fast, pair, z = folded(G), torch.cat([x, x]), torch.randn(n, 128, device=device)

    def full():
        detectors[1].score(x, y), vgg(pair), vgg(pair)

    parts = {"E": ([G.encoder], lambda: fast.encoder(x)),
             "D": ([G.decoder], lambda: fast.decoder(z, y)),
             "C_b": ([scorer], lambda: scorer(x, x, y))}
    for m, detector in detectors.items():
        parts[f"E, D, C_b, {m} mask{'s' * (m > 1)}"] = (
            [G, scorer], lambda detector=detector: detector.score(x, y))
    parts["VGG16, under LPIPS or DISTS"] = [vgg], lambda: vgg(pair)
    parts["E, D, C_b and two VGG16"] = [G, scorer, vgg, vgg], full
    parts["classifier: ResNet-18"] = [resnet], lambda: resnet(x)
    cost = {}
    print(f"{'part':30s}{'M params':>10s}{'G MACs':>10s}{'images/s':>10s}    batch {n}, {device}, "
          f"{torch.get_num_threads()} threads")
    for name, (nets, work) in parts.items():
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            with FlopCounterMode(display=False) as counter:
                work()
            rate = n / seconds(work, device)
        cost[name] = {"an image": dict(
            params=sum(p.numel() for net in nets for p in net.parameters()) / 1e6,
            macs=counter.get_total_flops() / 2e9 / n, rate=rate)}
        print(f"{name:30s}" + "{params:10.3f}{macs:10.4f}{rate:10.1f}".format(**cost[name]["an image"]))
    return cost


def bench_steps(args, generator_nets, scorer_nets, detector, x, y):
    """The three steps against the best matrix multiplication of the same precision, on images x
    (N, 3, 32, 32) with labels y (N,): {step and batch: {"an image": cost}}."""
    from torch.utils.flop_counter import FlopCounterMode
    (G, D, opt_g, opt_d), (scorer, opt), cost = generator_nets, scorer_nets, {}

    def generator_iteration(x, y):
        G.train()
        train_gen.train_step(G, D, opt_g, opt_d, x, random_mask(x)[0], y, 0.1, args.bf16)

    def scorer_iteration(x, y):
        G.eval()
        train_scorer.train_step(G, scorer, opt, x, random_mask(x)[0], y, (y + 1) % 10, None, args.bf16)

    scorer.train()
    # the nets' convolutions may use TF32: let the yardstick, too
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    a = torch.randn(2 * (BENCH_MATRIX,), device=x.device, dtype=torch.bfloat16 if args.bf16 else torch.float)
    work = {"generator iteration": generator_iteration, "C_b iteration": scorer_iteration,
            "inference": detector.score}
    print(f"\n{'step':30s}{'batch':>10s}{'images/s':>10s}{'GFLOP':>10s}{'share of':>10s} best "
          f"{'bfloat16' if args.bf16 else 'float32'} matrix multiplication, G/s")
    for name, b in ((name, b) for name, batches in BENCH_BATCHES.items() for b in batches):
        step = work[name]
        with FlopCounterMode(display=False) as counter:
            step(x[:b], y[:b])
        # the machine's best beside each measurement: other work on it slows both
        peak = 2 * BENCH_MATRIX**3 / 1e9 / seconds(lambda: a @ a, args.device)
        rate = b / seconds(lambda: step(x[:b], y[:b]), args.device)
        gflop = counter.get_total_flops() / 1e9 / b
        cost[f"{name}, batch {b}"] = {"an image": dict(
            rate=rate, gflop=gflop, counted=COUNTED[name], peak=peak, share=rate * COUNTED[name] / peak)}
        print(f"{name:30s}{b:10d}{rate:10.1f}{gflop:10.3f}{rate * COUNTED[name] / peak:10.1%}{peak:10.0f}")
    print("The share counts an image as the authors' step costs it: " + ", ".join(
        f"{name} {gflop} GFLOP" for name, gflop in COUNTED.items()))
    return cost


def first_score(detector, classifier, x, y, device):
    """Median seconds from starting Python to a picture's score, read from files as a user's are."""
    from torchvision.utils import save_image
    with tempfile.TemporaryDirectory() as folder:
        detector.calibrate(x[:40], y[:40]).save(Path(folder, "detector.pt"))
        save_checkpoint(Path(folder, "classifier.pt"), dict(
            kind="classifier", classifier=classifier.state_dict(),
            settings=dict(classes=[str(n) for n in range(10)], channels=3, stem="small")))
        picture, spent = Path(folder, "image.png"), []
        save_image(x[0], picture)
        command = [sys.executable, "-u", __file__, "--run", folder, "--images", str(picture),
                   "--device", device]
        for _ in range(BENCH_REPEATS):
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                lines = [next(process.stdout, ""), next(process.stdout, "")]  # head, first image
                spent.append(time.perf_counter() - start)
                process.stdout.read()
            if process.returncode or "image.png" not in lines[1]:
                raise ValueError("evaluate.py --images failed on an untrained detector")
    return float(np.median(spent))


# ---------------------------------------------------------------------------------------------
# The paper's tables (results/paper.json says which run measures which row)


def gather_tables(args):
    """Fill every table of results/paper.json from the results.json files below a folder: writes
    OUT/tables.json and OUT/TABLES.md. A cell is at results[view][method][set][metric] of the runs that
    match a pattern, each named by the table, the row or the column. Raises OSError or ValueError."""
    tables = json.loads(Path(__file__).with_name("results").joinpath("paper.json").read_text())
    folder, out, used = args.tables, args.out or "results", {}

    def read(at):
        """{run: value} of a cell."""
        values = {}
        for file in sorted(Path(folder).glob(f"{at['runs']}/results.json")):
            run = str(file.parent.relative_to(folder))
            try:
                results = json.loads(file.read_text())
                values[run] = results[at["view"]][at["method"]][at["set"]][at["metric"]]
                if results.get("split", "test") != at.get("split", "test"):
                    raise ValueError(f"numbers of the {results['split']} split")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} has no {at['view']}, {at['method']}, {at['set']}, "
                                 f"{at['metric']} ({error}): evaluate that run again") from error
            used[run] = {k: v for k, v in results.items() if k not in (*LABELINGS, "subsets", "cost")}
        return values

    for table in tables:
        for row in table["rows"]:
            row["ours"] = [read({**table, **row, **column}) for column in table["columns"]]
    if not used:
        raise OSError(f"{folder} holds none of the runs that results/paper.json names")
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(Path(out, "tables.json"), json.dumps(dict(tables=tables, runs=used), indent=1) + "\n")
    write_text(Path(out, "TABLES.md"), "\n".join(
        f"## {table['title']}\n\n{table['note']}\n\n{render(table)}" for table in tables))
    print(f"{out}/TABLES.md, {out}/tables.json: {len(used)} runs in {len(tables)} tables")


def render(table):
    """A gathered table as Markdown: ours as mean and, of several runs, ± standard deviation (ddof 1);
    the paper's values beside it, where it has any; with table["gain"], in brackets the gain on the
    first row, run by run in their order."""
    columns, first = table["columns"], table["rows"][0]
    theirs = [row.get("paper", [None] * len(columns)) for row in table["rows"]]
    known = [i for i in range(len(columns)) if any(values[i] is not None for values in theirs)]
    head = [table["of"], "runs", *(c["head"] for c in columns),
            *(f"paper's {columns[i]['head']}" for i in known)]
    lines = [head, ["---"] * len(head)]
    for row, values_of_paper in zip(table["rows"], theirs):
        cells, digits = [], [column.get("digits", 2) for column in columns]
        for column, values, before, d in zip(columns, row["ours"], first["ours"], digits):
            values, before = (column.get("scale", 100) * np.array(list(v.values()))
                              for v in (values, before))
            show = lambda v, sign="": f"{v.mean():{sign}.{d}f}" + (
                f" ± {v.std(ddof=1):.{d}f}" if len(v) > 1 else "")
            cells.append(show(values) if len(values) else "–")
            if table.get("gain") and row is not first and len(values) == len(before) > 0:
                cells[-1] += f" ({show(values - before, '+')})"
        for v, d in ((values_of_paper[i], digits[i]) for i in known):
            cells.append("–" if v is None else v if isinstance(v, str) else f"{v:.{d}f}")
        lines.append([row["label"], str(len(row["ours"][0])), *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ---------------------------------------------------------------------------------------------


def write_results(out, results, args):
    """OUT/results.json: the numbers with their command, source revision, versions and device."""
    results = dict(command=" ".join(["python evaluate.py", *args.argv]), **results,
                   revision=source_revision(), versions=dict(
                       python=platform.python_version(),
                       **{p: version(p) for p in ("torch", "torchvision", "scikit-learn", "numpy")}),
                   device=str(args.device), threads=torch.get_num_threads(), processes=WORLD)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")


def report(args, out, detector, settings, scored, steps, subsets, n_held):
    """Tables from the scores, written to OUT/results.json and printed."""
    own = [*detector.scorers, "cascade"]
    methods = [m for m in ("MSP", "ODIN", "EBO", *own) if m in scored["in-distribution"]]
    tables = {labeling: tabulate(scored, {m: m for m in (own if any(prefixes) else methods)}, labeling)
              for labeling, prefixes in LABELINGS.items()}
    threshold, shares = (detector.calibration[k] for k in ("threshold", "shares"))
    side = {name: (s["label"] >= 0) == (name == "in-distribution") for name, s in scored.items()}
    n = {name: int(rows.sum()) for name, rows in side.items()}
    flagged = {name: (s["cascade"][side[name]] < threshold).double().mean().item()
               for name, s in scored.items()}
    results = dict(
        split="dev" if args.dev else "test", settings=settings, steps=steps, n=n,
        n_in_distribution_inside={k: len(s["label"]) - n[k] for k, s in scored.items()
                                  if len(s["label"]) > n[k]},
        n_held_out=n_held, classifier=args.classifier or "classifier.pt", half=args.half,
        mask=dict(style=detector.mask_style, ratio=detector.mask_ratio, seed=detector.seed,
                  masks=detector.masks), bf16=args.bf16, scorers=list(detector.scorers),
        shares=shares, tpr=TPR, odin=dict(temperature=ODIN_TEMPERATURE, step=ODIN_STEP),
        flagged=flagged, **tables, subsets=tabulate(scored, subsets, "predicted_labels"))
    write_results(out, results, args)

    print(f"\n{'DEVELOPMENT SPLIT, not for reporting. ' * args.dev}Predicted labels, y = C(x); "
          f"percent; {', '.join(f'{k} {v}' for k, v in n.items())} images\n"
          f"{format_table(tables['predicted_labels'])}")
    print("\nThe same detector under three labelings, AUROC / FPR@TPR95: y = C(x); the authors' oracle "
          "labels (the\ntruth for in-distribution, random for OOD images); the truth for "
          "in-distribution, C(x) for OOD")
    for method in own:
        print(f"{method:15s}" + "".join("{auroc:12.2%} /{fpr95:7.2%}".format(**next(
            row for name, row in reversed(table[method].items()) if name != "std"))
            for table in tables.values()))
    print(f"\nAt the threshold for {TPR:.0%} TPR on held-out images (shares "
          f"{', '.join(f'{name} {s:.2f}' for name, s in shares.items())}), flagged as OOD: "
          + ", ".join(f"{name} {share:.1%}" for name, share in flagged.items()))


def round_nets(args, out, nets, classifier):
    """--half: every weight becomes its float16 value, so that what is calibrated and measured is what is
    distributed; writes OUT/classifier.pt."""
    path = Path(args.run, "classifier.pt")
    saved = load_checkpoint(path, "classifier")
    if args.classifier or "program" in saved:
        raise ValueError("--half needs the classifier that train_scorer.py trains")
    for net in (*nets, classifier):
        if isinstance(net, torch.nn.Module) and not isinstance(net, (LPIPS, DISTS)):  # saved by name
            net.load_state_dict(in_half(net.state_dict()))
    if RANK == 0:
        save_checkpoint(out / path.name, dict(saved, classifier=in_half(saved["classifier"]), opt=None))


def evaluate(args):
    """Calibrate and save the detector, score every set, write and print the numbers."""
    out, batch = Path(args.out or args.run), args.batch_size or 256
    G, settings, train = load_run(args)
    classes = settings["classes"]
    classifier, about = load_classifier(args.classifier or Path(args.run, "classifier.pt"),
                                        args.device, classes)
    scorers, steps = make_scorers(args.scorers or SCORERS[kind_of(settings["data"])], args.run,
                                  settings, args.device, classifier)
    if args.half:
        round_nets(args, out, [G, *scorers.values()], classifier)
    detector = MoodCat(G, scorers, args.mask_ratio or settings["mask_ratio"],
                       args.mask_style or settings["mask_style"], args.seed or 0, args.masks or 1,
                       args.bf16)
    sets = gather_sets(args, settings, train)

    # everything is fixed on held-out training images at y = C(x)
    x, names = train.x[train.held], train.names[train.held.cpu()]
    held = score_set(detector, classifier, x, train.y[train.held], "held-out", batch)
    second = held["second"][::2]
    wrong = dict(label=held["label"][::2], prediction=second, **{
        k: s.cpu() for k, s in detector.wrong_label_scores(to_float(x[::2]), second).items()})
    scored = {name: score_set(detector, classifier, x, labels, name, batch)
              for name, (x, labels, _) in sets.items()} if len(sets) > 1 else {}
    if RANK > 0:  # one process has every score now, and writes
        return
    detector.calibration, subsets = add_cascades({**scored, "held-out": held}, held, wrong,
                                                 list(scorers))
    detector.save(out / "detector.pt", args.half)
    if not scored:
        print(f"{out}/detector.pt is calibrated; for numbers, name OOD sets after --ood")
        return
    report(args, out, detector, settings, scored, dict(steps, classifier=about["steps"]), subsets,
           len(names))
    write_csv(out / "scores.csv", {**scored, **dict(zip(CALIBRATION, (held, wrong)))},
              {**{k: s[2] for k, s in sets.items()}, **dict(zip(CALIBRATION, (names, names[::2])))},
              classes)
    draw(out, detector, sets, scored, classes)
    if Path(args.run, "log.jsonl").exists():
        draw_curves(out / "curves.png", Path(args.run, "log.jsonl"))
    print(f"{out}: results.json, scores.csv, detector.pt, "
          + ", ".join(sorted(p.name for p in out.glob("*.png") if not p.name.startswith("samples"))))


def draw(out, detector, sets, scored, classes):
    """Every picture of an evaluation."""
    threshold = detector.calibration["threshold"]
    blocks = pick_blocks(sets, scored, threshold)
    draw_panel(out / "panels.png", blocks, detector, classes)
    strange, label = blocks[1][1][0], int(blocks[1][2][0])
    x, y, _ = sets["in-distribution"]  # Figure 4 wants an image of the same class, if there is one
    alike = x[(y == label).long().argmax()]
    draw_masks(out / "masks.png", detector.generator, alike, strange, label, classes)
    draw_scores(out, scored, [m for m in ("MSP", "ODIN", "EBO", *detector.scorers, "cascade")
                              if m in scored["in-distribution"]], threshold)


def main(argv=None):
    """Read the command line."""
    parser = Parser(__doc__).masking()
    add = parser.add_argument
    add("--ood", nargs="+", default=[], metavar="SET",
        help="cifar10, cifar100, svhn, dtd, cifar+10:0 to cifar+10:4, cifar+50 or folders of images")
    add("--scood", metavar="ROOT", help="the SC-OOD benchmark: images/ and imglist/benchmark_*/")
    add("--scorers", nargs="+", metavar="NAME",
        help="cb cb_extra lpips lpips-alex lpips-squeeze dists ssim energy [digits: cb ssim, otherwise "
             "cb lpips dists]")
    add("--masks", type=int, help="average each score over so many masks [1]")
    add("--classifier", metavar="FILE",
        help="another classifier, a program or another run's classifier.pt; needs --out")
    add("--out", metavar="FOLDER", help="for the results [RUN; --tables: results]")
    add("--half", action="store_true",
        help="round all weights to float16 first and write a small detector.pt and classifier.pt")
    add("--unknown-classes", nargs="+", metavar="CLASS",
        help="the classes of the OOD set 'unknown' [all that are not known]")
    add("--dev", action="store_true",
        help="development numbers, for choosing settings: training images only")
    add("--images", metavar="PATH", help="judge a picture or a folder of them")
    add("--bench", action="store_true", help="the cost of the paper's nets on this machine")
    add("--tables", metavar="FOLDER", help="fill the paper's tables from the runs below a folder")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    for mode, work in (("images", judge_images), ("bench", bench), ("tables", gather_tables)):
        if getattr(args, mode):
            keeps = ["images", "bench", "tables", "run", "out", "device", "batch_size", "argv"]
            keeps += ["bf16"] * (mode == "bench")
            for flag, value in vars(args).items():
                if value and flag not in keeps:
                    parser.error(f"--{mode} goes without --{flag.replace('_', '-')}")
            return work(args)
    for flag in ("half", "classifier"):
        if getattr(args, flag) and Path(args.out or args.run).resolve() == Path(args.run).resolve():
            parser.error(f"--{flag} needs an --out of its own: RUN keeps its weights and thresholds")
    evaluate(args)


if __name__ == "__main__":
    run_script(main)
