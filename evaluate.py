"""Out-of-distribution detection with a trained run, and its numbers. Trains nothing.

    python evaluate.py                                           # digits, after the other two
    python evaluate.py --run runs/cifar10 --ood cifar100 svhn dtd FOLDER
    python evaluate.py --run runs/cifar10 --scorers cb lpips-squeeze
    python evaluate.py --run runs/cifar10 --images my_photos     # verdicts on your own pictures

In-distribution: the run's test split. OOD: the test images of the other classes ("unknown"), when
there are any, and the sets after --ood. The headline uses y = C(x); the authors' protocol (true
labels for in-distribution, random labels for OOD images) follows under its own name. Ranks, shares
and threshold of the cascade are fixed on held-out training images: no test image chooses anything.
Writes into RUN: detector.pt, results.json, scores.csv, panels.png, histograms.png, roc.png.
"""

import csv
import io
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
import torchvision
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

from moodcat import DISTS, LPIPS, BinaryScorer, MoodCat, load_checkpoint, load_weights, ssim
from train_gen import (Parser, Split, download, fit_image, image_files, kind_of, read_files,
                       run_script, to_float, write_text)
from train_scorer import load_classifier, load_run, predict

# ---------------------------------------------------------------------------------------------
# Settings

SCORERS = dict(digits=["cb", "ssim"], colour=["cb", "lpips", "dists"])  # colour: the paper's
TPR = 0.95                   # share of in-distribution images to accept
ODIN_TEMPERATURE = 1000.0    # its paper's defaults; its step of 0.0014 is for images in [0, 1], ...
ODIN_STEP = 2 * 0.0014       # ... ours span twice that
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
# Scoring


def make_scorers(names, run, settings, device):
    """The scorers that --scorers names: cb, lpips (= lpips-vgg), lpips-alex, lpips-squeeze, dists,
    ssim. Raises OSError or ValueError."""
    scorers = {}
    for name in names:
        if name == "cb":
            path = Path(run, "scorer.pt")
            if not path.exists():
                raise OSError(f"{path} does not exist: run train_scorer.py --run {run} first")
            saved = load_checkpoint(path, "scorer", device)
            differ = [k for k in ("classes", "generator_id") if saved["settings"][k] != settings[k]]
            if differ:
                raise ValueError(f"{path} was trained with other {' and '.join(differ)} than "
                                 "generator.pt: delete it and run train_scorer.py again")
            if saved["best"]["weights"] is None:
                raise ValueError(f"{path} stopped before its first look at held-out pairs: go on with "
                                 "train_scorer.py --resume")
            scorers[name] = load_weights(
                BinaryScorer(len(settings["classes"]), settings["ch"], settings["channels"]),
                saved["best"]["weights"], path)
        elif name == "ssim":
            scorers[name] = ssim
        elif name == "dists":
            scorers[name] = DISTS()
        elif name.split("-")[0] == "lpips":
            scorers[name] = LPIPS(name.partition("-")[2] or "vgg")
        else:
            raise ValueError(f"no scorer {name!r}: cb, lpips, lpips-alex, lpips-squeeze, dists, ssim")
    return scorers


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
    else:
        files = image_files(name)
        return read_files(files, channels, size), files
    x = np.stack([fit_image(image, channels, size) for image, _ in images])
    return torch.from_numpy(x), range(len(x))


def score_set(detector, classifier, x, y_oracle, title, batch=256):
    """Everything about one set of uint8 images x (N, C, S, S): prediction (N,), the score (N,) of
    each method under y = C(x), and of each scorer under the labels y_oracle (N,)."""
    parts = []
    K = detector.generator.settings["num_classes"]
    start = time.time()
    for i in range(0, len(x), batch):
        chunk, y = x[i:i + batch].to(detector.device), y_oracle[i:i + batch]
        images, logits = to_float(chunk), predict(classifier, chunk, K)
        part = dict(prediction=logits.argmax(1), **baselines(classifier, images, logits))
        part.update(detector.score(images, logits.argmax(1)))
        part.update({f"oracle {name}": s for name, s in detector.score(images, y).items()})
        parts.append({k: v.detach().cpu().numpy() for k, v in part.items()})
        done, spent = i + len(chunk), time.time() - start
        if sys.stderr.isatty() or done == len(x):
            print(f"{chr(13) if sys.stderr.isatty() else ''}{title} {done}/{len(x)} images "
                  f"{done / spent:.0f}/s {(len(x) - done) * spent / done / 60:.1f} min left",
                  end="\n" if done == len(x) else "", file=sys.stderr, flush=True)
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def calibrated_detector(args, G, classifier, settings, split):
    """The run's nets with everything fixed on the held-out training images, at y = C(x)."""
    names = args.scorers or SCORERS[kind_of(settings["data"])]
    detector = MoodCat(G, make_scorers(names, args.run, settings, args.device), seed=args.seed or 0)
    x = split.x[split.held]
    guesses = predict(classifier, x, len(settings["classes"])).topk(2).indices
    return detector.calibrate(to_float(x), guesses[:, 0], TPR, guesses[:, 1])


# ---------------------------------------------------------------------------------------------
# Table, files, pictures


def tabulate(sets, methods, accuracy):
    """{method: {set: metrics}} with a row "mean" and "std" (ddof 1) where there are several sets."""
    table = {}
    for shown, key in methods.items():
        rows = {name: dict(ood_metrics(sets["in-distribution"][key], s[key]), accuracy=accuracy)
                for name, s in sets.items() if name != "in-distribution"}
        if len(rows) > 1:
            values = {c: [row[c] for row in rows.values()] for c in COLUMNS}
            rows["mean"] = {c: float(np.mean(v)) for c, v in values.items()}
            rows["std"] = {c: float(np.std(v, ddof=1)) for c, v in values.items()}
        table[shown] = rows
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
    here = Path(__file__).parent
    if not shutil.which("git"):
        return "unknown"
    git = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
    head = git("rev-parse", "--short", "HEAD")
    return head.stdout.strip() + "+" * bool(git("status", "--porcelain", "-uno").stdout) \
        if head.returncode == 0 else "unknown"


def write_csv(path, sets, names, classes, methods, threshold):
    """One line an image: set, image, prediction, every score under y = C(x), flagged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "image", "prediction", *methods, "flagged"])
    for key, scores in sets.items():
        flagged = (scores["cascade"] < threshold).astype(int)
        for i, name in enumerate(names[key]):
            writer.writerow([key, name, classes[scores["prediction"][i]],
                             *(repr(float(scores[m][i])) for m in methods), flagged[i]])
    write_text(path, text.getvalue())


def pyplot():
    """matplotlib without a screen; imported when there is something to draw."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_panel(path, blocks, detector, classes):
    """Figures 5 to 8: for each (title, uint8 images, labels), input, masked and synthesis."""
    plt = pyplot()
    blocks = [b for b in blocks if len(b[1])]
    fig, axes = plt.subplots(len(blocks), 1, figsize=(8, 2.7 * len(blocks)), squeeze=False)
    for ax, (title, x, y) in zip(axes[:, 0], blocks):
        x, y = to_float(x).to(detector.device), torch.as_tensor(y).to(detector.device)
        rows = [torch.cat(list(r), 2) for r in (x, *detector.synthesise(x, y))]  # side by side
        grid = ((torch.cat(rows, 1).cpu() + 1) / 2).permute(1, 2, 0)
        ax.imshow(grid.numpy().squeeze(), cmap="gray", vmin=0, vmax=1)
        side = x.shape[-1]
        ax.set_xticks([side * (i + 0.5) for i in range(len(x))], [classes[c] for c in y.tolist()])
        ax.set_yticks([side * (i + 0.5) for i in range(3)], ["input", "masked", "synthesis"])
        ax.tick_params(length=0, labelsize=8)
        ax.set_title(title, fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_scores(run, sets, methods, threshold):
    """Histograms of each method's score by set, and ROC curves of all OOD sets together."""
    plt = pyplot()
    fig, axes = plt.subplots(1, len(methods), figsize=(2.8 * len(methods), 2.6))
    for ax, method in zip(axes, methods):
        low, high = np.percentile(np.concatenate([s[method] for s in sets.values()]), [1, 99])
        for name, s in sets.items():
            ax.hist(s[method].clip(low, high), 30, range=(low, high), density=True, alpha=0.5, label=name)
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
        inside = sets["in-distribution"][method]
        outside = np.concatenate([s[method] for k, s in sets.items() if k != "in-distribution"])
        fpr, tpr, _ = roc_curve(np.r_[np.ones(len(inside)), np.zeros(len(outside))],
                                np.r_[inside, outside])
        ax.plot(fpr, tpr, lw=1.2, label=method)
    ax.set(xlabel="OOD accepted", ylabel="in-distribution accepted")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(Path(run, "roc.png"), dpi=110)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------


def judge_images(args):
    """--images: a line and a panel column for each of the user's pictures."""
    if not Path(args.run, "detector.pt").exists():
        raise OSError(f"{args.run}/detector.pt does not exist: run evaluate.py --run {args.run} first")
    detector = MoodCat.load(Path(args.run, "detector.pt"), args.device)
    classifier, classes = load_classifier(args.run, args.device)
    want = detector.generator.settings
    files = image_files(args.images)
    x = read_files(files, want["channels"], want["image_size"]).to(args.device)
    y = predict(classifier, x, want["num_classes"]).argmax(1)
    scores = detector.score(to_float(x), y)
    if "cascade" not in scores:
        raise ValueError(f"{args.run}/detector.pt is not calibrated: run evaluate.py --run {args.run}")
    ood = (scores["cascade"] < detector.calibration["threshold"]).tolist()
    print("\t".join(["image", "prediction", *scores, "verdict"]))
    for i, file in enumerate(files):
        print("\t".join([str(file), classes[y[i]], *(f"{s[i]:.4f}" for s in scores.values()),
                         "OOD" if ood[i] else "in-distribution"]))
    path = Path(args.run, "images.png")
    order = scores["cascade"].argsort()[:12].cpu()
    draw_panel(path, [("your images, the most suspicious first", x[order], y[order])], detector,
               classes)
    print(f"{sum(ood)} of {len(files)} rejected; {path}")


def gather_sets(args, settings, train):
    """What to score: {set: (uint8 images, their names)}, "in-distribution" first, and the true labels
    of the in-distribution images. Raises OSError or ValueError."""
    if args.dev:
        rows = torch.nonzero(train.held)[1::2, 0]  # the even ones chose C_b's checkpoint
        sets = {"in-distribution": (train.x[rows], train.names[rows.cpu()])}
        labels, unknown = train.y[rows], (train.unknown, train.unknown_names)
    else:
        test = Split(settings, "test", args.device)
        sets, labels = {"in-distribution": (test.x, test.names)}, test.y
        unknown = (test.unknown, test.unknown_names)
    if len(unknown[0]):
        sets["unknown"] = unknown
    for name in args.ood:
        key = "/".join(Path(name).parts[-2:])
        if key in sets or key in ("mean", "std"):
            raise ValueError(f"there is a set {key!r} already: rename a folder")
        sets[key] = load_ood(name, settings["image_size"], settings["channels"])
    return sets, labels


def pick_blocks(sets, scored, threshold):
    """For draw_panel: a fair sample of the in-distribution and the first OOD set, then their worst
    mistakes."""
    inside = scored["in-distribution"]
    outside = next(name for name in scored if name != "in-distribution")
    blocks = []
    for name, title in (("in-distribution", "in-distribution"), (outside, f"OOD: {outside}")):
        some = np.random.default_rng(0).permutation(len(scored[name]["prediction"]))[:10]
        blocks.append((title, sets[name][0][some], scored[name]["prediction"][some]))
    order = np.argsort(inside["cascade"])[:10]
    order = order[inside["cascade"][order] < threshold]
    blocks.append(("in-distribution, rejected", sets["in-distribution"][0][order],
                   inside["prediction"][order]))
    order = np.argsort(-scored[outside]["cascade"])[:10]
    order = order[scored[outside]["cascade"][order] >= threshold]
    blocks.append((f"OOD, accepted: {outside}", sets[outside][0][order],
                   scored[outside]["prediction"][order]))
    return blocks


def main(argv=None):
    """Calibrate and save the detector, score every set, write and print the numbers."""
    parser = Parser(__doc__)
    parser.add_argument("--ood", nargs="+", default=[], metavar="SET",
                        help="cifar10, cifar100, svhn, dtd or folders of images")
    parser.add_argument("--scorers", nargs="+", metavar="NAME",
                        help="cb lpips lpips-alex lpips-squeeze dists ssim [digits: cb ssim, "
                             "otherwise cb lpips dists]")
    parser.add_argument("--images", metavar="PATH", help="judge a picture or a folder of them")
    parser.add_argument("--unknown-classes", nargs="+", metavar="CLASS",
                        help="the classes of the OOD set 'unknown' [all that are not known]")
    parser.add_argument("--dev", action="store_true",
                        help="development numbers, for choosing settings: training images only")
    args = parser.parse_args(argv)
    if args.images:
        return judge_images(args)
    G, settings, train = load_run(args)
    classifier, _ = load_classifier(args.run, args.device, settings["classes"])
    detector = calibrated_detector(args, G, classifier, settings, train)
    detector.save(Path(args.run, "detector.pt"))
    classes, threshold = settings["classes"], detector.calibration["threshold"]
    trained = ["generator", "classifier"] + ["scorer"] * ("cb" in detector.scorers)
    steps = {k: load_checkpoint(Path(args.run, f"{k}.pt"), k).get("step") for k in trained}

    sets, labels = gather_sets(args, settings, train)
    if len(sets) == 1:
        print(f"{args.run}/detector.pt is calibrated; for numbers, name OOD sets after --ood")
        return

    random_labels = torch.Generator().manual_seed(0)
    scored = {}
    for name, (x, _) in sets.items():
        oracle = labels if name == "in-distribution" else torch.randint(
            len(classes), (len(x),), generator=random_labels)
        scored[name] = score_set(detector, classifier, x, oracle, name, args.batch_size or 256)
    inside = scored["in-distribution"]
    accuracy = float((inside["prediction"] == labels.cpu().numpy()).mean())

    own = [*detector.scorers, "cascade"]
    methods = [m for m in ("MSP", "ODIN", "EBO", *own) if m in inside]
    predicted = tabulate(scored, {m: m for m in methods}, accuracy)
    oracle = tabulate(scored, {m: f"oracle {m}" for m in own}, accuracy)
    flagged = {name: float((s["cascade"] < threshold).mean()) for name, s in scored.items()}
    results = dict(
        command=" ".join(["python evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        split="dev" if args.dev else "test", settings=settings, mask_seed=args.seed or 0,
        steps=steps,
        scorers=list(detector.scorers), shares=detector.calibration["shares"], tpr=TPR,
        n={name: len(s["prediction"]) for name, s in scored.items()}, n_held_out=int(train.held.sum()),
        odin=dict(temperature=ODIN_TEMPERATURE, step=ODIN_STEP), predicted_labels=predicted,
        oracle_labels=oracle, flagged=flagged, revision=source_revision(),
        versions=dict(python=platform.python_version(), torch=str(torch.__version__),
                      torchvision=str(torchvision.__version__), sklearn=sklearn.__version__,
                      numpy=np.__version__), device=str(args.device))
    run = Path(args.run)
    write_text(run / "results.json", json.dumps(results, indent=1) + "\n")
    write_csv(run / "scores.csv", scored, {k: v[1] for k, v in sets.items()}, classes, methods,
              threshold)

    draw_panel(run / "panels.png", pick_blocks(sets, scored, threshold), detector, classes)
    draw_scores(run, scored, methods, threshold)

    n = ", ".join(f"{name} {len(s['prediction'])}" for name, s in scored.items())
    print(f"\n{'DEVELOPMENT SPLIT, not for reporting. ' * args.dev}Predicted labels, y = C(x); "
          f"percent; {n} images\n{format_table(predicted)}")
    print("\nThe authors' oracle labels: the truth for in-distribution, a random label for OOD images"
          f"\n{format_table(oracle)}")
    shares = ", ".join(f"{name} {s:.1f}" for name, s in detector.calibration["shares"].items())
    print(f"\nAt the threshold for {TPR:.0%} TPR on held-out images (shares {shares}), flagged as OOD: "
          + ", ".join(f"{name} {share:.1%}" for name, share in flagged.items()))
    print(f"{run}/results.json, scores.csv, detector.pt, panels.png, histograms.png, roc.png")


if __name__ == "__main__":
    run_script(main)
