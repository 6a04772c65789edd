"""Train the classifier under protection, then C_b, the scorer (section 3.5, Figure 3, Eq. 2).

    python train_scorer.py                                       # digits, after train_gen.py
    python train_scorer.py --run runs/cifar10                    # its own ResNet-18, then C_b
    python train_scorer.py --run runs/mine --classifier mine.pt  # your classifier, then C_b
    python train_scorer.py --run runs/cifar10 --resume           # go on after an interruption
    python train_scorer.py --run runs/cifar10 --extra FOLDER     # then a second C_b: unlabeled data

--classifier takes a TorchScript or torch.export program, (B, C, S, S) in [-1, 1] to logits (B, K) in
the order of the classes, for any batch size B. Such a file can run code: use only one you trust.
Writes RUN/classifier.pt and RUN/scorer.pt (--extra: RUN/scorer_extra.pt alone) and goes on with
RUN/log.jsonl.
"""

import io
import math
import warnings
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

from moodcat import (BinaryScorer, Generator, auroc, hinge_loss, load_checkpoint, load_weights,
                     random_mask, save_checkpoint)
from train_gen import (BATCH, BETAS, LOG_EVERY, WORLD, Loop, Parser, Split, average, earlier,
                       image_files, in_bf16, kind_of, out_of_memory, read_files, run_script, share,
                       to_float)

# ---------------------------------------------------------------------------------------------
# Settings

STEPS = dict(digits=400, colour=40_000)             # of C_b
CLASSIFIER_STEPS = dict(digits=150, colour=45_000)  # 96 images each: 96 passes over CIFAR-10
LR = 1e-3             # the paper's is 5e-5; higher, for trainings of minutes to hours
LR_CLASSIFIER = 0.02  # SGD, momentum 0.9, weight decay 5e-4, cosine to 0
WARM_UP = 0.1         # share of the steps in which the rate rises from 0
CHECKS = 10           # looks at the held-out pairs in a training

# ---------------------------------------------------------------------------------------------
# The classifier under protection


def make_classifier(num_classes, channels, stem):
    """torchvision's ResNet-18: (B, channels, S, S) in [-1, 1] -> logits (B, num_classes). Stem "small"
    is the usual one for 32 px (3x3, stride 1, no pooling); "fast" has stride 2: a quarter of the cost."""
    from torchvision.models import resnet18  # takes seconds; programs need none
    net = resnet18(num_classes=num_classes)
    net.conv1 = torch.nn.Conv2d(channels, 64, 3, 1 if stem == "small" else 2, 1, bias=False)
    net.maxpool = torch.nn.Identity()
    return net


def augment(x, mirror):
    """Random shifts by up to an eighth of the side (4 pixels of 32), and mirror images where asked:
    x (B, C, S, S) -> the same shape."""
    B, _, S, _ = x.shape
    padded = F.pad(x, (S // 8,) * 4, mode="reflect" if mirror else "replicate")
    shift = torch.randint(2 * (S // 8) + 1, (2, B, 1)).to(x.device)
    rows = shift[0] + torch.arange(S, device=x.device)                           # (B, S)
    cols = shift[1] + torch.arange(S, device=x.device)
    if mirror:
        cols = torch.where(torch.rand(B, 1).to(x.device) < 0.5, cols, cols.flip(1))
    image = torch.arange(B, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)


def train_classifier(args, settings, split):
    """Cross-entropy on the training images; writes RUN/classifier.pt, returns the net in eval()."""
    torch.manual_seed(settings["seed"])
    net = make_classifier(len(settings["classes"]), settings["channels"], settings["stem"])
    if WORLD > 1 and args.device.startswith("cuda"):
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(args.device, memory_format=torch.channels_last)
    opt = torch.optim.SGD(net.parameters(), LR_CLASSIFIER, momentum=0.9, weight_decay=5e-4,
                          nesterov=True)
    x_all, y_all = split.x[~split.held], split.y[~split.held]
    loop = Loop(args, "classifier", settings, dict(classifier=net, opt=opt), settings["steps"])
    classify = in_bf16(net, settings["bf16"])
    for step in loop:
        done = step / settings["steps"]
        opt.param_groups[0]["lr"] = (LR_CLASSIFIER * min(1, (done + 1e-3) / WARM_UP)
                                     * 0.5 * (1 + math.cos(math.pi * done)))
        batch = torch.randint(len(x_all), (settings["batch_size"],)).to(args.device)
        x = augment(to_float(x_all[batch]), mirror=settings["channels"] == 3)
        x, y = share(x, y_all[batch])
        loss = F.cross_entropy(classify(x), y)
        opt.zero_grad()
        loss.backward()
        average(net)
        opt.step()
        loop.log(loss=loss.detach())
    return net.eval()


def load_program(blob, device):
    """The bytes of a TorchScript or torch.export file -> a callable. Raises ValueError."""
    from torch.export.passes import move_to_device_pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its retirement
        for load in (lambda f: torch.jit.load(f, map_location=device).eval(),
                     lambda f: move_to_device_pass(torch.export.load(f), device).module()):
            try:
                return load(io.BytesIO(blob))
            except Exception:  # each loader fails in its own way on the other's files
                continue
    raise ValueError("the classifier is neither a TorchScript nor a torch.export file (nor a run's "
                     "classifier.pt under that name)")


def load_classifier(path, device, classes=None):
    """A run's classifier.pt, or a program under any other name -> callable, images (B, C, S, S) in
    [-1, 1] to logits (B, K), and the steps and class names of a run's, which must be `classes` where
    those are given. Raises OSError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{path} does not exist: run train_scorer.py for a classifier.pt")
    if path.name != "classifier.pt":  # a run's has always this name
        return load_program(path.read_bytes(), device), dict(classes=classes, steps=None)
    saved = load_checkpoint(path, "classifier", device)
    settings = saved["settings"]
    if classes and settings["classes"] != classes:
        raise ValueError(f"{path} was trained on the classes {', '.join(settings['classes'])}, not "
                         f"{', '.join(classes)}")
    about = dict(classes=settings["classes"], steps=saved.get("step"))
    if "program" in saved:
        return load_program(saved["program"].cpu().numpy().tobytes(), device), about
    net = make_classifier(len(settings["classes"]), settings["channels"], settings["stem"])
    load_weights(net, saved["classifier"], path)
    return net.to(device).eval(), about


@torch.no_grad()
def predict(classifier, x, num_classes, batch=256):
    """uint8 images (N, C, S, S) -> logits (N, K). Raises ValueError when the classifier does not fit."""
    logits = torch.empty(len(x), num_classes, device=x.device)  # parts to be joined scatter the heap
    try:
        for i in range(0, len(x), batch):
            part = classifier(to_float(x[i:i + batch]))
            if part.shape != logits[i:i + batch].shape:
                raise ValueError(f"the classifier returns {tuple(part.shape)}, the run has "
                                 f"{num_classes} classes")
            logits[i:i + batch] = part
    except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"the classifier fails on images {tuple(x.shape[1:])} in batches of "
                         f"{batch} (it must take any batch size and return logits): {error}") from error
    return logits


# ---------------------------------------------------------------------------------------------
# C_b


class Best:
    """The weights with the best held-out accuracy so far (ties: the smaller loss), kept with the
    checkpoint."""

    def __init__(self):
        self.mark, self.step, self.weights = (-1.0, 0.0), 0, None

    def state_dict(self):
        return dict(mark=list(self.mark), step=self.step, weights=self.weights)

    def load_state_dict(self, state):
        self.mark, self.step, self.weights = tuple(state["mark"]), state["step"], state["weights"]

    def offer(self, mark, step, net):
        if mark > self.mark:
            self.mark, self.step = mark, step
            self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}


def wrong_labels(y, num_classes, logits=None):
    """y (N,) -> y' (N,), uniform over the labels that are not y (Figure 3), or, given the classifier's
    logits (N, K), by its probabilities for those labels: its likeliest mistakes most often."""
    if logits is None:
        return (y + torch.randint(1, num_classes, y.shape).to(y.device)) % num_classes
    others = logits.cpu().scatter(1, y.cpu()[:, None], -math.inf).softmax(1)
    return torch.multinomial(others, 1)[:, 0].to(y.device)


@torch.no_grad()
def pair_scores(G, scorer, x, y, mask):
    """C_b's scores (N,) of uint8 images x under labels y (N,), with masks that never change; mask:
    ratio and style for random_mask."""
    scores = []
    generator = torch.Generator().manual_seed(0)
    for xs, ys in zip(x.split(256), y.split(256)):
        xs = to_float(xs)
        x_m, _ = random_mask(xs, **mask, generator=generator)
        scores.append(scorer(xs, G(x_m, ys)[0], ys))
    return torch.cat(scores)


def train_step(G, scorer, opt, x, x_m, y, y_not, more=None, bf16=False):
    """One iteration of Figure 3: images x and masked images x_m (B, C, S, S), labels y and wrong labels
    y_not (B,); more: x, x_m and wrong labels of unlabeled images. Returns the loss (Eq. 2)."""
    n = len(x)
    x, x_m, y = torch.cat([x, x]), torch.cat([x_m, x_m]), torch.cat([y, y_not])
    if more:
        x, x_m, y = (torch.cat(pair) for pair in zip((x, x_m, y), more))
    with torch.no_grad():  # G is frozen
        x_fake = in_bf16(G, bf16)(x_m, y)[0]
    score = in_bf16(scorer, bf16)(x, x_fake, y)
    loss = hinge_loss(score[:n], score[n:])
    opt.zero_grad()
    loss.backward()
    average(scorer)
    opt.step()
    return loss.detach()


def build_scorer(num_classes, ch, channels, device):
    """C_b and its optimiser, on the device."""
    scorer = BinaryScorer(num_classes, ch, channels).to(device, memory_format=torch.channels_last)
    return scorer, torch.optim.Adam(scorer.parameters(), LR, BETAS,
                                    fused=str(device).startswith("cuda"))


def train_scorer(args, settings, split, G, y_wrong, steps, name="scorer", logits=None, extra=None):
    """Eq. 2: (x, G(x, y), y) against (x, G(x, y'), y') with wrong labels y'. y_wrong: one for each
    held-out image, to measure with; logits (N, K): the classifier's of the training images, where its
    likely mistakes are to be the wrong labels. extra (section 3.6): uint8 images (M, C, S, S) without
    labels and their logits (M, K), more of the second kind of pair: half of each batch. Writes
    RUN/<name>.pt."""
    K, likely = len(settings["classes"]), logits is not None
    torch.manual_seed(settings["seed"])
    scorer, opt = build_scorer(K, settings["ch"], settings["channels"], args.device)
    best = Best()
    mask = dict(ratio=settings["mask_ratio"], style=settings["mask_style"])  # the generator's
    x_all, y_all = split.x[~split.held], split.y[~split.held]
    # the even held-out images choose the checkpoint; evaluate.py sets its threshold on the odd ones
    x_check, y_check, wrong_check = split.x[split.held][::2], split.y[split.held][::2], y_wrong[::2]
    loop = Loop(args, name, settings, dict(scorer=scorer, opt=opt, best=best), steps, args.minutes)
    length = 1000 if steps == math.inf else steps
    check_every = max(1, length // CHECKS // LOG_EVERY) * LOG_EVERY  # with the log's steps

    def look(step):
        """Offer the weights after that many steps to `best`, by the held-out pairs."""
        scorer.eval()
        right = pair_scores(G, scorer, x_check, y_check, mask)
        wrong = pair_scores(G, scorer, x_check, wrong_check, mask)
        scorer.train()
        accuracy = ((right > 0).float().mean() + (wrong <= 0).float().mean()).item() / 2
        best.offer((accuracy, -hinge_loss(right, wrong).item()), step, scorer)
        return dict(pair_accuracy=accuracy, pair_auroc=auroc(right, wrong))

    n_extra = settings["batch_size"] // 2 if extra else 0
    for step in loop:
        batch = torch.randint(len(x_all), (settings["batch_size"] - n_extra,)).to(args.device)
        x, y = to_float(x_all[batch]), y_all[batch]
        y_not = wrong_labels(y, K, logits[batch] if likely else None)
        pairs, more = (x, random_mask(x, **mask)[0], y, y_not), None
        if extra:
            batch = torch.randint(len(extra[0]), (n_extra,)).to(args.device)
            x, guess = to_float(extra[0][batch]), extra[1][batch]
            x_m, pseudo = random_mask(x, **mask)[0], guess.argmax(1)
            more = share(x, x_m, pseudo if settings["negatives"] == "pseudo" else
                         wrong_labels(pseudo, K, guess if likely else None))
        loss = train_step(G, scorer, opt, *share(*pairs), more, settings["bf16"])
        loop.log(loss=loss)
        if (step + 1) % check_every == 0 or step + 1 == steps:
            loop.log(**look(step + 1))
    if best.weights is None:  # --minutes ended before the first look
        look(loop.step)
        loop.save()
    print(f"{loop.path}: {loop.step} steps, best pair accuracy {best.mark[0]:.3f} at {best.step}")


def fingerprint(weights):
    """A number that tells one net's weights from another's."""
    return zlib.crc32(b"".join(v.cpu().numpy().tobytes() for v in weights.values()))


def load_run(args):
    """RUN/generator.pt -> G in eval(), frozen, the settings it was trained with and its training
    split. --data may move the data; anything else that differs is a ValueError."""
    path = Path(args.run, "generator.pt")
    if not path.exists():
        raise OSError(f"{path} does not exist: run train_gen.py --run {args.run} first")
    saved = load_checkpoint(path, "generator", args.device)
    settings = saved["settings"]
    if args.image_size not in (None, settings["image_size"]):
        raise ValueError(f"{path} was trained with --image-size {settings['image_size']}")
    settings.update(data=args.data or settings["data"], generator_id=fingerprint(saved["generator"]),
                    generator_steps=saved["step"],
                    known=args.known_classes or settings["classes"],
                    unknown=getattr(args, "unknown_classes", None))
    split = Split(settings, "train", args.device)
    if split.classes != settings["classes"] or split.x.shape[1] != settings["channels"]:
        raise ValueError(f"{path} was trained on the classes {', '.join(settings['classes'])} with "
                         f"{settings['channels']} channel(s), not {', '.join(split.classes)} with "
                         f"{split.x.shape[1]}")
    settings["known"] = split.classes  # by name, whatever other folders the test split has
    G = Generator(len(settings["classes"]), settings["ch"], settings["image_size"],
                  settings["channels"], conditional=settings["conditional"])
    load_weights(G, saved["generator"], path)
    return G.to(args.device).eval().requires_grad_(False), settings, split


def store_program(args, settings, split):
    """--classifier FILE -> RUN/classifier.pt, and a callable."""
    path, blob = Path(args.run, "classifier.pt"), Path(args.classifier).read_bytes()
    program = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    classifier = load_program(blob, args.device)
    predict(classifier, split.x[:3], len(settings["classes"]))
    if not path.exists():
        save_checkpoint(path, dict(kind="classifier", settings=settings, program=program))
    elif not torch.equal(load_checkpoint(path, "classifier").get("program", program[:0]), program):
        raise ValueError(f"{path} holds another classifier: choose another --run, or delete it")
    return classifier


def unlabeled(args, settings, split, classifier):
    """--extra -> uint8 images (M, C, S, S) and the classifier's logits (M, K)."""
    if args.extra == "unknown":
        x = split.unknown
        if not len(x):
            raise ValueError("every class of the data is known: --extra needs a folder")
    else:
        x = read_files(image_files(args.extra), settings["channels"], settings["image_size"])
        x = x.to(args.device)
    return x, predict(classifier, x, len(settings["classes"]))


def main(argv=None):
    """Settle the settings, then train the classifier, unless there is one, and C_b."""
    parser = Parser(__doc__).training()
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--classifier", metavar="FILE", help="your own, instead of training one")
    source.add_argument("--extra", metavar="FOLDER",
                        help="unlabeled images for a second C_b, its class folders ignored (section "
                             "3.6); 'unknown': the training images of the --unknown-classes")
    parser.add_argument("--classifier-steps", type=int,
                        help="its length (--steps and --minutes are C_b's) [digits 150, else 45000]")
    parser.add_argument("--stem", choices=["small", "fast"],
                        help="of the ResNet-18: 3x3 with stride 1 or 2 [digits fast, otherwise small]")
    parser.add_argument("--unknown-classes", nargs="+", metavar="CLASS",
                        help="for --extra unknown [all that are not known]")
    parser.add_argument("--negatives", choices=["uniform", "likely", "pseudo"],
                        help="wrong labels for C_b: uniform as in the paper; by the classifier's "
                             "probabilities; with --extra, external images under their pseudo label "
                             "[uniform]")
    args = parser.parse_args(argv)
    if args.unknown_classes and args.extra != "unknown":
        parser.error("--unknown-classes goes with --extra unknown")
    if args.negatives == "pseudo" and not args.extra:
        parser.error("--negatives pseudo goes with --extra")
    G, settings, split = load_run(args)
    kind, K = kind_of(settings["data"]), len(settings["classes"])
    name = "scorer_extra" if args.extra else "scorer"
    had = earlier(args, name)
    settings.update({k: had.get(k, default) if given is None else given for k, given, default in (
        ("seed", args.seed, settings["seed"]), ("bf16", args.bf16 or None, False),
        ("batch_size", args.batch_size, BATCH[kind]), ("negatives", args.negatives, "uniform"))},
                    extra=args.extra)
    path = Path(args.run, "classifier.pt")
    if not path.exists():  # thresholds belong to a classifier
        Path(args.run, "detector.pt").unlink(missing_ok=True)
    if args.extra:
        classifier, _ = load_classifier(path, args.device, settings["classes"])
    elif args.classifier:
        classifier = store_program(args, settings, split)
    else:
        had = earlier(args, "classifier")
        own = {k: had.get(k, settings[k]) for k in ("data", "classes", "image_size", "channels",
                                                    "seed", "batch_size", "bf16")}
        own["stem"] = args.stem or had.get("stem", "fast" if kind == "digits" else "small")
        own["steps"] = args.classifier_steps or had.get("steps", CLASSIFIER_STEPS[kind])
        classifier = train_classifier(args, own, split)
    logits = predict(classifier, split.x[split.held], K)
    y_held = split.y[split.held]
    print(f"classifier: held-out accuracy {(logits.argmax(1) == y_held).float().mean():.4f}")
    extra = unlabeled(args, settings, split, classifier) if args.extra else None
    if extra:
        print(f"{len(extra[0])} unlabeled images from {args.extra}")

    # the likeliest label that is wrong stands for the classifier's mistakes on OOD images
    y_wrong = logits.scatter(1, y_held[:, None], -math.inf).argmax(1)
    steps = args.steps or (math.inf if args.minutes else STEPS[kind])
    logits = predict(classifier, split.x[~split.held], K) if settings["negatives"] == "likely" else None
    train_scorer(args, settings, split, G, y_wrong, steps, name, logits, extra)


if __name__ == "__main__":
    run_script(main)
