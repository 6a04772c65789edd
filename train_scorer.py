"""Train the classifier under protection, then C_b, the scorer (section 3.5, Figure 3, Eq. 2).

    python train_scorer.py                                       # digits, after train_gen.py
    python train_scorer.py --run runs/cifar10 --mirror           # its own ResNet-18, then C_b
    python train_scorer.py --run runs/mine --classifier mine.pt  # your classifier instead
    python train_scorer.py --run runs/cifar10 --extra FOLDER     # then a second C_b: unlabeled data

--classifier takes another run's classifier.pt, or a TorchScript or torch.export program, images (B,
C, S, S) in [-1, 1] to logits (B, K) in the order of the classes, for any B; evaluate.py takes it,
too. A program can run code: use only one you trust. Writes RUN/classifier.pt and RUN/scorer.pt or
scorer_extra.pt, each with its log beside it.
"""

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

from moodcat import FORMAT, BinaryScorer, Generator, fold, hinge_loss, load_checkpoint, random_mask
from train_gen import (BETAS, LOG_EVERY, Parser, Split, draw, image_files, image_hashes, parallel,
                       read_images, run_script, to_float, training)

# Settings; net "conv" is a small convolutional net of these widths, "resnet18" the paper's
PRESETS = {"digits": dict(steps=500, ch=8, net="conv", widths=(8, 16, 32, 64), classifier_steps=300,
                          classifier_batch=64, classifier_rate=0.1),
           "colour": dict(steps=40_000, ch=32, net="resnet18", widths=(24, 64, 256, 256),
                          classifier_steps=8_500, classifier_batch=512, classifier_rate=0.4)}
LR = 1e-3         # C_b's, down to 0 along a line; the paper's is 5e-5; for minutes to hours
SMOOTHING = 0.1   # of the classifier's labels; its rate goes up and down once (SGD)
VALIDATIONS = 5   # in a training of C_b

# --- The classifier under protection -------------------------------------------------------------
def make_classifier(net, widths, num_classes, channels):
    """(B, channels, S, S) in [-1, 1] -> logits (B, num_classes): torchvision's ResNet-18 with the
    usual stem for 32 px (3x3, stride 1, no pooling), or a stem and two layers for each width."""
    if net == "resnet18":
        from torchvision.models import resnet18  # takes seconds; others need none
        model = resnet18(num_classes=num_classes)
        model.conv1, model.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
        return model
    conv = lambda cin, cout: nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    layers = [nn.Conv2d(channels, widths[0], 2), nn.GELU()]  # as Jordan's airbench: 32 px to 31
    for cin, cout in zip(widths, widths[1:]):
        layers += [conv(cin, cout), nn.MaxPool2d(2), nn.BatchNorm2d(cout), nn.GELU(),
                   conv(cout, cout), nn.BatchNorm2d(cout), nn.GELU()]
    layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(cout, num_classes)]
    return nn.Sequential(*layers)

def augment(x, mirror):
    """x (B, C, S, S) shifted at random by up to an eighth of the side and, if asked, mirrored."""
    B, _, S, _ = x.shape
    padded = F.pad(x, (S // 8,) * 4, mode="reflect")
    down, right = torch.randint(2 * (S // 8) + 1, (2, B)).to(x.device)
    crops = padded.unfold(2, S, 1).unfold(3, S, 1)         # (B, C, S/4 + 1, S/4 + 1, S, S), a view
    x = crops[torch.arange(B, device=x.device), :, down, right]                     # (B, C, S, S)
    return torch.where(torch.rand(B, 1, 1, 1).to(x.device) < 0.5, x, x.flip(3)) if mirror else x

def train_classifier(args, settings, split):
    """Cross-entropy on the training images; writes RUN/classifier.pt, returns the net in eval()."""
    torch.manual_seed(settings["seed"])
    net = make_classifier(settings["net"], settings["widths"], len(split.classes), split.x.shape[1])
    model, steps = parallel(net, args.device), settings["classifier_steps"]
    opt = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    x_all, y_all = split.x[~split.held], split.y[~split.held]
    for step, log in training(args, "classifier", settings, dict(classifier=net, opt=opt), steps):
        cycle = min((step + 0.5) / steps / 0.25, (1 - (step + 0.5) / steps) / 0.75)  # up and down
        opt.param_groups[0]["lr"] = settings["classifier_rate"] * cycle
        x, y = draw(settings["classifier_batch"], x_all, y_all)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=settings["bf16"]):
            logits = model(augment(x, settings["mirror"]))
        loss = F.cross_entropy(logits.float(), y, label_smoothing=SMOOTHING)
        opt.zero_grad()
        loss.backward()
        opt.step()
        log(loss=loss.detach())
    return net.eval()

def load_program(path, blob, device):
    """A TorchScript or torch.export file of these bytes -> a callable. Raises ValueError."""
    archive = io.BytesIO(blob)
    inside = " ".join(zipfile.ZipFile(archive).namelist()) if zipfile.is_zipfile(archive) else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit announces its retirement
            if "/code/" in inside:
                return torch.jit.load(io.BytesIO(blob), map_location=device).eval()
            if "archive_format" in inside or "exported_program" in inside:
                from torch.export.passes import move_to_device_pass
                return move_to_device_pass(torch.export.load(io.BytesIO(blob)), device).module()
    except Exception as error:  # each loader fails in its own ways
        raise ValueError(f"{path} cannot be loaded: {str(error)[:200]}") from error
    raise ValueError(f"{path} is no program: try torch.jit.trace(model.eval(), example).save(FILE)")

def load_classifier(run, file, device, expected=None):
    """RUN/classifier.pt, another run's or a program -> callable, images (B, C, S, S) in [-1, 1] to
    logits (B, K); its fingerprint; its class names or None. Raises OSError or ValueError, also for
    a checkpoint of other class names than `expected`, if given."""
    path = Path(file or Path(run, "classifier.pt"))
    blob = path.read_bytes() if file else b""
    if file and FORMAT.encode() not in blob:  # a checkpoint says so, uncompressed
        return load_program(path, blob, device), fingerprint(blob), None
    saved = load_checkpoint(path, "classifier", device)
    settings, classes = saved["settings"], saved["settings"]["classes"]
    if expected not in (None, classes):
        raise ValueError(f"{path} knows other classes: {', '.join(classes)}")
    if saved["step"] < saved["steps"]:
        raise ValueError(f"{path} is not trained to its end: train_scorer.py --resume")
    net = make_classifier(settings["net"], settings["widths"], len(classes), settings["channels"])
    net.load_state_dict(saved["classifier"])
    return fold(net.to(device)), fingerprint(saved["classifier"]), classes

def fingerprint(content):
    """16 hexadecimal digits that tell one file's bytes, or one net's weights, from another's."""
    if not isinstance(content, bytes):
        content = b"".join(v.cpu().contiguous().numpy().tobytes() for v in content.values())
    return hashlib.sha256(content).hexdigest()[:16]

@torch.no_grad()
def predict(classifier, x, num_classes, batch=256):
    """uint8 images (N, C, S, S) -> logits (N, K). Raises ValueError where the classifier fails."""
    logits = []
    try:
        for part in x.split(batch):
            logits.append(classifier(to_float(part)).float())
            if logits[-1].shape != (len(part), num_classes):
                raise TypeError(f"it returns {tuple(logits[-1].shape)} for {num_classes} classes")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"the classifier fails on a batch of {batch} images: {error}") from error
    return torch.cat(logits)

# --- C_b -----------------------------------------------------------------------------------------
def mismatched(y, num_classes):
    """y (N,) -> y' (N,), uniform over the labels that are not y (Figure 3)."""
    return (y + torch.randint(1, num_classes, y.shape).to(y.device)) % num_classes

@torch.no_grad()
def validate(G, scorer, x, y, mask_ratio):
    """C_b's accuracy and AUROC between right and mismatched labels on up to 1,000 of the uint8
    images x (N, C, S, S), with the same masks and labels every time."""
    x, y = to_float(x[::len(x) // 1000 + 1]), y[::len(y) // 1000 + 1]
    x_m, _ = random_mask(x, mask_ratio, torch.Generator().manual_seed(0))
    pairs = (y, (y + 1) % G.settings["num_classes"])
    scores = torch.cat([scorer(x, G(x_m, label)[0], label).cpu() for label in pairs])
    right = torch.arange(len(scores)) < len(y)
    return dict(val_accuracy=((scores > 0) == right).double().mean().item(),
                val_auroc=roc_auc_score(right, scores))

def train_step(G, scorer, opt, x, x_m, y, right, bf16=False):
    """Figure 3's step: images x, masked x_m, labels y, right (B,) bool -> loss (Eq. 2)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():  # G is frozen
            x_fake = G(x_m, y)[0].float()
        score = scorer(x, x_fake, y).float()
    loss = hinge_loss(score[right], score[~right])
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.detach()

def train_scorer(args, name, settings, split, G, extra=None):
    """Eq. 2: (x, G(x, y), y) against (x, G(x, y'), y') with mismatched y', into RUN/<name>.pt.
    extra (section 3.6): uint8 images (M, C, S, S), pseudo labels (M,): half of each batch as y'."""
    K, steps, ratio = len(settings["classes"]), settings["steps"], settings["mask_ratio"]
    torch.manual_seed(settings["seed"])
    scorer = BinaryScorer(K, settings["ch"], settings["channels"])
    model = parallel(scorer, args.device)
    opt = torch.optim.Adam(model.parameters(), LR, BETAS, fused=True)
    x_all, y_all = split.x[~split.held], split.y[~split.held]
    every = max(1, steps // VALIDATIONS // LOG_EVERY) * LOG_EVERY
    for step, log in training(args, name, settings, dict(scorer=scorer, opt=opt), steps):
        opt.param_groups[0]["lr"] = LR * (1 - step / steps)
        n_extra = settings["batch_size"] // 2 if extra else 0
        x, y = draw(settings["batch_size"] - n_extra, x_all, y_all)
        x = augment(x, True) if settings["mirror"] else x  # before the mask, so that x' follows
        x_m, _ = random_mask(x, ratio)
        x, x_m, y = torch.cat([x, x]), torch.cat([x_m, x_m]), torch.cat([y, mismatched(y, K)])
        right = torch.arange(len(y), device=y.device) < len(y) // 2
        if extra:
            more, pseudo = draw(n_extra, *extra)
            more = augment(more, True) if settings["mirror"] else more
            x, x_m = torch.cat([x, more]), torch.cat([x_m, random_mask(more, ratio)[0]])
            y, right = torch.cat([y, mismatched(pseudo, K)]), F.pad(right, (0, len(more)))
        log(loss=train_step(G, model, opt, x, x_m, y, right, settings["bf16"]))
        if (step + 1) % every == 0 or step + 1 == steps:
            scorer.eval()
            log(**validate(G, scorer, split.x[split.held], split.y[split.held], ratio))
            scorer.train()
    return load_checkpoint(Path(args.run, f"{name}.pt"), name)

def weaknesses(accuracy, num_classes, checkpoints):
    """Why not to trust a detector: held-out accuracy, checkpoints {name: dict} -> lines."""
    lines = []
    if accuracy < (1 + 1 / num_classes) / 2:
        lines.append(f"the classifier is right on {accuracy:.0%} held out: does it take [-1, 1]?")
    for name, saved in checkpoints.items():
        step, steps, auroc = saved["step"], saved["steps"], saved["log"].get("val_auroc", 1)
        passes = step * saved["settings"]["batch_size"] / saved["settings"]["n"]
        if step < steps or passes < 1:
            lines.append(f"{name} stopped at step {step} of {steps}, after {passes:.2f} passes")
        if auroc < 0.6:
            lines.append(f"{name} hardly tells right from mismatched labels: AUROC {auroc:.2f}")
    return lines

def load_run(args):
    """RUN/generator.pt -> G for inference, its checkpoint without weights, and its training split.
    --data may say where the data are now. Raises OSError or ValueError."""
    saved = load_checkpoint(Path(args.run, "generator.pt"), "generator", args.device)
    settings = saved["settings"]
    settings["data"], size = args.data or settings["data"], settings["image_size"]
    split = Split(settings["data"], "train", settings["classes"], size, args.device)
    if split.fingerprint != settings["fingerprint"]:
        raise ValueError(f"the training images in {settings['data']} are not those that the run's "
                         "generator was trained on: restore them, or train with another --run")
    G = Generator(len(split.classes), settings["ch"], size, settings["channels"],
                  conditional=settings["conditional"])
    G.load_state_dict(saved["generator"])
    about = {k: saved[k] for k in ("settings", "step", "steps", "log")}
    about.update(id=fingerprint(saved["generator"]), all_classes=split.all_classes)
    return fold(G.to(args.device)), about, split

def main(argv=None):
    """Settle the settings, then train the classifier, unless there is one, and C_b."""
    parser = Parser(__doc__, steps="of C_b [digits 500, otherwise 40000]")
    add = parser.add_argument
    add("--classifier", metavar="FILE", help="another run's, or a program, instead of training")
    add("--classifier-steps", type=int, help="[digits 300, otherwise 8500]")
    add("--ch", type=int, help="C_b's channel multiplier [digits 8, otherwise 32]")
    add("--net", choices=["conv", "resnet18"], help="[digits conv, otherwise resnet18]")
    add("--mirror", action="store_true", help="mirror images, and shift C_b's: not for text, signs")
    add("--extra", metavar="FOLDER", help="unlabeled images for a second C_b (section 3.6)")
    args = parser.parse_args(argv)
    G, about, split = load_run(args)
    K, preset = len(split.classes), PRESETS["digits" if split.x.shape[1] == 1 else "colour"]
    own = {k: getattr(args, k, None) or v for k, v in preset.items()}
    steps, ch = own.pop("steps"), own.pop("ch")
    same = "classes", "channels", "image_size", "fingerprint", "n"
    settings = dict({k: about["settings"][k] for k in same}, seed=args.seed, bf16=args.bf16,
                    mirror=args.mirror)
    if args.classifier or args.extra:
        classifier, _, _ = load_classifier(args.run, args.classifier, args.device, split.classes)
    else:
        classifier = train_classifier(args, dict(settings, **own), split)
    logits = predict(classifier, split.x[split.held], K)
    accuracy = (logits.argmax(1) == split.y[split.held]).float().mean().item()
    print(f"classifier: held-out accuracy {accuracy:.4f}")
    settings.update({k: about["settings"][k] for k in ("batch_size", "mask_ratio")},
                    ch=ch, steps=steps, generator=about["id"])
    name, extra = "scorer", None
    if args.extra:
        x = read_images(image_files(args.extra), *split.x.shape[1:3]).to(args.device)
        settings.update(extra=args.extra, extra_hashes=image_hashes(x).tolist())
        name, extra = "scorer_extra", (x, predict(classifier, x, K).argmax(1))
        print(f"{len(x)} unlabeled images from {args.extra}")
    saved = train_scorer(args, name, settings, split, G, extra)
    print("C_b: held-out accuracy {val_accuracy:.3f}, AUROC {val_auroc:.3f}".format(**saved["log"]))
    for line in weaknesses(accuracy, K, {"generator": about, name: saved}):
        print(f"warning: {line}")

if __name__ == "__main__":
    run_script(main)
