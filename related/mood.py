"""MOOD: masked image modelling for out-of-distribution detection (Li et al., CVPR 2023), small.

    python -m related.mood                                       # digits, after the quickstart
    python -m related.mood --run runs/cifar10 --mirror --ood FOLDER [--backbone timm:NAME]

A ViT learns the visual tokens of masked patches (pt), then labels (ft). An image is OOD when its
feature lies far, in Mahalanobis distance, from those of the training images. Rows: stages as in
Table 4 (neither, pt, ft, pt+ft; "ft long": ft for the steps of both) by three distances, Table 5's
metrics of pt+ft. Writes RUN/mood.json (mood_timm.json), RUN/mood_*.pt. To choose settings, --dev 4
5 takes known classes for unknown: the others' held-out images against theirs, in RUN/dev-4-5.
"""

import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluate import format_table, gather_sets, provenance, tabulate, write_json
from train_gen import Parser, draw, parallel, run_script, to_float, training
from train_scorer import augment, load_run

# Minutes on a core; digits' by development splits (results/DEVELOPMENT.md), colour's untried
PRESETS = {"digits": dict(width=64, depth=4, heads=4, codes=64, steps=1200, finetune_steps=400),
           "colour": dict(width=192, depth=6, heads=3, codes=512, steps=2500, finetune_steps=2000)}
PATCH, BATCH, WEIGHT_DECAY, WARM_UP = 4, 64, 0.05, 0.1  # WARM_UP: share of the steps
RATE, TUNE_RATE, TIMM_RATE = 2e-3, 1e-3, 2e-5  # AdamW's peak; the public code: 5e-4, then 2e-5
DECAY, TIMM_DECAY = 0.08, 0.9       # of the fine-tuning rate: over all blocks (0.9**24), over one
MASKED, LEAST = 75 / 196, 16 / 196  # share of the patches masked, and of a block: BEiT's
ALPHA, TOKENIZER_IMAGES = 0.1, 1000  # label smoothing (Eq. 1); images whose patches k-means sees

# --- Pretext task: predict the visual tokens of masked patches (section 3.1, BEiT) ---------------
def blockwise_mask(side, count, least, rng):
    """BEiT's mask of a (side, side) grid of patches -> bool, True = masked, `count` at most. Blocks
    of at least `least` patches, while as many are left; an overlap counts once. rng: random.Random,
    drawn in the order area, log-aspect, top, left. Ten blocks in a row that do not fit end it."""
    mask, tries, left = np.zeros((side, side), bool), 0, count
    while left and tries < 10:
        area = rng.uniform(least, left)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        tries += 1
        if h < side and w < side:
            i, j = rng.randint(0, side - h), rng.randint(0, side - w)
            new = h * w - mask[i:i + h, j:j + w].sum()
            if 0 < new <= left:
                mask[i:i + h, j:j + w] = True
                tries, left = 0, left - new
    return torch.from_numpy(mask)

def to_patches(x):
    """x (B, C, S, S) -> (B, N, C * PATCH**2), N = (S / PATCH)**2, row by row."""
    return F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)

class Tokenizer(nn.Module):
    """Visual tokens: of each patch the nearest of `codes` k-means centroids (BEiT: a dVAE) of uint8
    images (N, C, S, S); x (B, C, S, S) in [-1, 1] -> (B, N) in [0, codes). Raises ValueError."""
    def __init__(self, images, codes, seed=0):
        from sklearn.cluster import KMeans
        super().__init__()
        rows = np.random.default_rng(seed).permutation(len(images))[:TOKENIZER_IMAGES]
        patches = to_patches(to_float(images.cpu()[rows])).flatten(0, 1).numpy()
        centroids = KMeans(codes, n_init=1, random_state=seed).fit(patches).cluster_centers_
        self.register_buffer("centroids", torch.from_numpy(centroids))

    def forward(self, x):
        return torch.cdist(to_patches(x), self.centroids[None]).argmin(2)

def mim_loss(logits, tokens, mask):
    """-mean over masked patches of log p(token | masked x): logits (B, N, codes), tokens (B, N),
    mask (B, N) bool, True = masked -> scalar. The other patches play no part."""
    return F.cross_entropy(logits[mask].float(), tokens[mask])

def smoothed_loss(logits, y, alpha=ALPHA):
    """Cross-entropy against y (1 - alpha) + alpha / K (Eq. 1): logits (B, K), y (B,) -> scalar."""
    return F.cross_entropy(logits.float(), y, label_smoothing=alpha)

# --- Networks ------------------------------------------------------------------------------------
class ViT(nn.Module):
    """Vision transformer without class token and BEiT's relative positions, layer scale, drop path:
    x (B, C, S, S) in [-1, 1] -> logits (B, outputs) of f = LayerNorm(mean of patch tokens); given a
    mask (B, N), True = masked, of each patch: (B, N, outputs)."""
    def __init__(self, outputs, image_size, channels, width, depth, heads):
        super().__init__()
        table = lambda rows: nn.Parameter(0.02 * torch.randn(rows, width))
        self.embed = nn.Linear(channels * PATCH**2, width)
        self.mask_token, self.positions = table(1), table((image_size // PATCH)**2)
        how = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(width, heads, 4 * width, **how)
                                      for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def tokens(self, x, mask=None):
        t = self.embed(to_patches(x))                                     # (B, N, width)
        mask = torch.zeros_like(t[..., 0], dtype=torch.bool) if mask is None else mask
        t = torch.where(mask[:, :, None], self.mask_token.to(t.dtype), t)
        return self.blocks(t + self.positions)                            # (B, N, width)

    def features(self, x):
        return self.norm(self.tokens(x).mean(1))                          # (B, width)

    def forward(self, x, mask=None):
        return self.head(self.features(x) if mask is None else self.norm(self.tokens(x, mask)))

class TimmNet(nn.Module):
    """A pretrained net of the optional package timm: x (B, 1 or 3, S, S) in [-1, 1], so BEiT's mean
    and deviation of 0.5 -> logits (B, num_classes). Raises OSError."""
    def __init__(self, name, num_classes):
        super().__init__()
        try:
            import timm
            self.net = timm.create_model(name, pretrained=True, num_classes=num_classes)
            self.side, self.head = self.net.patch_embed.img_size[0], self.net.get_classifier()
            if self.net.global_pool != "avg" or {*self.net.pretrained_cfg["mean"]} != {0.5}:
                raise ValueError("it averages no patch tokens, or takes no images in [-1, 1]")
        except Exception as error:  # no timm, unknown names, downloads, nets of another kind
            raise OSError(f"no timm:{name}, a BEiT of timm (pip install timm): {error}") from error

    def features(self, x):
        i = self.side // 14  # as in the public code: resize to 256, keep the centre's 224
        x = F.interpolate(x.expand(-1, 3, -1, -1), (self.side + 2 * i,) * 2, mode="bicubic")
        x = x.clamp(-1, 1)[..., i:i + self.side, i:i + self.side]         # (B, 3, side, side)
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    def forward(self, x):
        return self.head(self.features(x))

# --- Training ------------------------------------------------------------------------------------
def layer_groups(net, rate, decay):
    """AdamW's groups with a rate for each layer, rate * decay**(L + 1 - l): l = 0 for patches and
    positions, 1 to L for the blocks, L + 1 for norm and head."""
    found = {}
    for name, p in net.named_parameters():
        part = re.search(r"\bblocks\.(\d+)\.|\b(?:norm|fc_norm|head)\.", name)
        found.setdefault(int(part[1] or 999) + 1 if part else 0, []).append(p)
    return [dict(params=found[l], peak=rate * decay**i) for i, l in enumerate(sorted(found)[::-1])]

def train(args, name, net, rate, decay, settings, steps, loss, images, y, **parts):
    """Train net into RUN/<name>.pt with AdamW on uint8 images (N, C, S, S), labels y (N,) for a
    loss(model, x, y) -> scalar; parts: what else the checkpoint keeps. Returns net in eval()."""
    model = parallel(net.train(), args.device)
    opt = torch.optim.AdamW(layer_groups(net, rate, decay), weight_decay=WEIGHT_DECAY)
    for step, log in training(args, name, settings, dict(parts, net=net, opt=opt), steps):
        done = (step + 0.5) / steps
        for group in opt.param_groups:
            group["lr"] = group["peak"] * min(done / WARM_UP, (1 + math.cos(math.pi * done)) / 2)
        x, target = draw(BATCH, images, y)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            value = loss(model, augment(x, args.mirror), target)
        opt.zero_grad()
        value.backward()
        opt.step()
        log(loss=value.detach())
    return net.eval()

def stages(args, settings, images, y):
    """Table 4's {stage: net}, trained where missing on uint8 images (N, C, S, S), labels y (N,)."""
    K, pt_steps, ft_steps = len(settings["classes"]), settings["steps"], settings["finetune_steps"]
    side = settings["image_size"] // PATCH
    grid = side, round(MASKED * side**2), max(1, round(LEAST * side**2))
    torch.manual_seed(args.seed)  # timm draws a head
    def finetune(name, net, rate, decay=1.0, steps=ft_steps):
        loss = lambda model, x, y: smoothed_loss(model(x), y)
        return train(args, f"mood_{name}", net, rate, decay, settings, steps, loss, images, y)
    def fresh(outputs=K):
        torch.manual_seed(args.seed)
        size = (settings[k] for k in ("image_size", "channels", "width", "depth", "heads"))
        return ViT(outputs, *size).to(args.device).eval()
    if args.backbone != "vit":
        nets = [TimmNet(args.backbone.removeprefix("timm:"), K).to(args.device) for _ in range(2)]
        return {"pt": nets[0].eval(), "pt+ft": finetune("timm", nets[1], TIMM_RATE, TIMM_DECAY)}
    tokenizer = Tokenizer(images, settings["codes"], args.seed).to(args.device)
    def pretext(model, x, y):
        rng = random.Random(int(torch.randint(2**62, ())))  # from the seed of this step
        mask = torch.stack([blockwise_mask(*grid, rng).flatten() for _ in y]).to(x.device)
        return mim_loss(model(x, mask), tokenizer(x), mask)
    own, net = {k: v for k, v in settings.items() if k != "finetune_steps"}, fresh()
    pt = train(args, "mood_pt", fresh(settings["codes"]), RATE, 1.0, own, pt_steps, pretext,
               images, y, tokenizer=tokenizer)
    net.load_state_dict({**pt.state_dict(), **net.head.state_dict(prefix="head.")})
    return {"neither": fresh(), "pt": pt, "ft": finetune("ft", fresh(), TUNE_RATE),
            "ft long": finetune("ft_long", fresh(), TUNE_RATE, steps=pt_steps + ft_steps),
            "pt+ft": finetune("pt_ft", net, TUNE_RATE, DECAY**(1 / settings["depth"]))}

# --- Scores (section 3.4, Table 5) ---------------------------------------------------------------
def normalise(features):
    """features (N, D) -> the same directions, of length 1 (N, D)."""
    features = torch.as_tensor(features)
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)

def mahalanobis(train, test, labels=None, kind="one"):
    """(f - mu)^T pinv(Sigma) (f - mu) of test features (M, D) given train features (N, D), labels
    (N,) -> (M,) float64, higher = further. kind "one": one Gaussian for all classes (the public
    code); "cc": mean and covariance of each class, the least distance; "shared": class means, one
    covariance (MOODv2, features not normalised). Covariances divide by N. Raises ValueError."""
    train, test = (torch.as_tensor(t).detach().cpu().double() for t in (train, test))
    if kind not in ("one", "cc", "shared") or (kind != "one" and labels is None) or len(train) < 2:
        raise ValueError("no distance: one, or with labels cc, shared; of two features a class")
    labels = torch.zeros(len(train)) if kind == "one" else torch.as_tensor(labels).cpu()
    classes = [train[labels == c] for c in labels.unique()]
    if kind == "cc":
        return torch.stack([mahalanobis(own, test) for own in classes]).min(0).values
    means = torch.stack([own.mean(0) for own in classes])                 # (K, D)
    within = torch.cat([own - mu for own, mu in zip(classes, means)])     # (N, D)
    # numpy's cut-off of 1e-15 lets the rounding of float32 features in, and of few images
    inverse = torch.linalg.pinv(within.T @ within / len(within), rtol=1e-10, hermitian=True)
    return torch.stack([((test - mu) @ inverse * (test - mu)).sum(1) for mu in means]).amin(0)

def logit_scores(logits, features):
    """Table 5's other metrics, higher = in-distribution: logits (M, K), features (M, D) -> {name:
    (M,)}. GradNorm: L1 norm of d KL(uniform || p) / dW of the last layer, of each image."""
    log_p, p = logits.log_softmax(1), logits.softmax(1)
    norm = (p - 1 / p.shape[1]).abs().sum(1) * features.abs().sum(1)
    return {"softmax": log_p.amax(1), "entropy": (p * log_p).sum(1),
            "energy": logits.logsumexp(1), "GradNorm": norm}

@torch.no_grad()
def score(stage, net, images, y, sets, title="MOOD"):
    """A stage's {set: {column: (M,)}} for tabulate(), from uint8 training images (N, C, S, S), as
    they are, and labels y (N,). A net without a head for y predicts the nearest class."""
    extract = lambda x: torch.cat([net.features(to_float(part)).float() for part in x.split(256)])
    known, scored = extract(images), {}
    for name, (x, labels, _) in sets.items():
        f = extract(x)
        unit, logits = (normalise(known), normalise(f)), net.head(f)
        columns = {"one": -mahalanobis(*unit), "cc": -mahalanobis(*unit, y, "cc"),
                   "shared": -mahalanobis(known, f, y, "shared")}
        columns.update(logit_scores(logits, f) if stage == "pt+ft" else {})
        if "ft" not in stage:
            logits = torch.stack([-mahalanobis(unit[0][y == c], unit[1]) for c in y.unique()], 1)
        scored[name] = {f"{title} {stage} {k}": v.cpu() for k, v in columns.items()}
        scored[name].update(label=labels.cpu(), prediction=logits.argmax(1).cpu())
    return scored

def rows_beside(run, n, fingerprint):
    """Rows of RUN/results.json and, of the same classifier, shift.json, if about these images."""
    table, classifier = {}, None
    for path in filter(Path.exists, (Path(run, "results.json"), Path(run, "shift.json"))):
        found = json.loads(path.read_text())
        images = found.get("n"), found.get("settings", {}).get("fingerprint")
        if images == (n, fingerprint) and classifier in (None, found.get("classifier")):
            table.update(found["predicted_labels"])
            classifier = found.get("classifier")
        else:
            print(f"no rows of {path}: it is about other images or another classifier")
    return table

def main(argv=None):
    """Settle settings and sets, train the stages, write and print the numbers."""
    parser = Parser(__doc__, steps="of pretraining [digits 1200, otherwise 2500]")
    add = parser.add_argument
    add("--finetune-steps", type=int, help="[digits 400, otherwise 2000]")
    add("--backbone", default="vit", help="vit, or timm:NAME for weights of timm [%(default)s]")
    add("--ood", nargs="+", default=[], metavar="SET", help="as for evaluate.py")
    add("--mirror", action="store_true", help="train on mirror images, too: for photographs")
    add("--dev", nargs="+", default=[], metavar="CLASS", help="known classes to take for unknown")
    args = parser.parse_args(argv)
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu")  # its backward is slow on a CPU
    _, about, split = load_run(args)
    classes = [c for c in split.classes if c not in args.dev]
    if len(classes) < 2 or not set(args.dev) <= set(split.classes) or (args.dev and args.ood):
        raise ValueError(f"--dev, without --ood, must leave two of {', '.join(split.classes)}")
    relabel = [classes.index(c) if c in classes else -1 for c in split.classes]
    y = torch.tensor(relabel, device=args.device)[split.y]
    pick = lambda rows: (split.x[rows], y[rows], None)
    known = pick(~split.held & (y >= 0))[:2]
    if known[1].bincount(minlength=len(classes)).min() < 2:
        raise ValueError("MOOD needs two training images of each class beside the held-out ones")
    sets = gather_sets(args, about, {}) if not args.dev else {
        "in-distribution": pick(split.held & (y >= 0)), "unknown": pick(~split.held & (y < 0))}
    args.run = str(Path(args.run, "-".join(["dev", *args.dev]) if args.dev else ""))
    if len(sets) < 2:
        raise ValueError("no image is OOD: name OOD sets after --ood")
    preset = PRESETS["digits" if split.x.shape[1] == 1 else "colour"].items()
    settings = dict({k: getattr(args, k, None) or v for k, v in preset}, classes=classes,
                    **{k: about["settings"][k] for k in ("image_size", "channels", "fingerprint")},
                    **{k: getattr(args, k) for k in ("seed", "bf16", "mirror", "backbone")},
                    **{k: v for k, v in globals().items() if isinstance(v, (int, float))})
    n = {name: len(x) for name, (x, _, _) in sets.items()}
    own, beside = {}, {} if args.dev else rows_beside(args.run, n, split.fingerprint)
    title, name = ("MOOD", "mood") if args.backbone == "vit" else (args.backbone, "mood_timm")
    for stage, net in stages(args, settings, *known).items():
        scored = score(stage, net, *known, sets, title)
        methods = [c for c in scored["in-distribution"] if c.startswith(title)]
        own.update(tabulate(scored, methods, "predicted_labels"))
    results = dict(provenance(), command=" ".join(["python -m related.mood", *sys.argv[1:]]),
                   settings=settings, n=n, predicted_labels=own)
    if args.backbone != "vit":
        results["versions"]["timm"] = sys.modules["timm"].__version__
    write_json(Path(args.run, f"{name}.json"), results)
    print(f"\nPercent; images: {n}\n{format_table({**beside, **own})}")

if __name__ == "__main__":
    run_script(main)
