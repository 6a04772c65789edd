"""MOOD: masked image modelling for out-of-distribution detection (Li et al., CVPR 2023), small.

    python -m related.mood                                       # digits, after the quickstart
    python -m related.mood --run runs/cifar10 --mirror --ood FOLDER [--backbone timm:NAME]
    python -m related.mood --dev 4 5                             # to choose settings

A ViT learns the visual tokens of masked patches (pt), then labels (ft). An image is OOD when its
feature lies far, in Mahalanobis distance, from those of the training images. Rows: stages
(neither, pt, ft, pt+ft; "ft long": ft for the steps of both) by three distances, Table 5's metrics
of pt+ft. Writes RUN/mood.json (mood_timm.json) and RUN/mood_*.pt. --dev takes known classes
for unknown: the others' held-out images against theirs, in RUN/dev-4-5.
"""

import math
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluate import Scored, tabulate
from paper.common import add_energy
from related.common import choose_sets, report
from train_gen import (Parser, Run, averaged, parse, random_batch, run_script, seed_step,
                       to_float)
from train_scorer import (augment, fingerprint, load_classifier, load_generator, predict,
                          training_split)

# Minutes on a core; chosen on the digits' development splits (results/DEVELOPMENT.md), those of
# photographs are untried. Each is a flag, and stands in the checkpoints and in mood.json.
MOOD = dict(
    #                 digits    photographs  what it is; the papers' value
    width=           (64,       192,         "of the ViT"),
    depth=           (4,        6,           "blocks of the ViT"),
    heads=           (4,        3,           "of each block"),
    patch=           (4,        4,           "pixels of a patch's side"),
    codes=           (64,       512,         "visual tokens; BEiT's dVAE has 8192"),
    tokenizer_images=(1000,     1000,        "images whose patches k-means sees"),
    masked=          (75 / 196, 75 / 196,    "share of the patches masked; BEiT's"),
    least_block=     (16 / 196, 16 / 196,    "share of the patches in a block, the least; BEiT's"),
    steps=           (1200,     2500,        "of pretraining"),
    lr=              (2e-3,     2e-3,        "of pretraining, the highest"),
    batch_size=      (64,       64,          "images"),
    weight_decay=    (0.05,     0.05,        "of AdamW"),
    warm_up=         (0.1,      0.1,         "share of the steps in which a rate goes up"),
    mirror=          (False,    False,       "train on mirror images, too: for photographs"),
    bf16=            (False,    False,       "nets in bfloat16"),
    seed=            (0,        0,           "of all random numbers"))
FINETUNING = dict(
    finetune_steps=  (400,      2000,        "of fine-tuning"),
    finetune_lr=     (1e-3,     1e-3,        "the highest; the public code: 5e-4"),
    finetune_decay=  (0.08,     0.08,        "of that rate over all blocks; the code: 0.9**24"),
    timm_lr=         (2e-5,     2e-5,        "of timm's weights, the public code's"),
    timm_decay=      (0.9,      0.9,         "of that rate over one block, the public code's"),
    smoothing=       (0.1,      0.1,         "of the labels (Eq. 1)"))

# --- The method: pretraining, fine-tuning, distances ---------------------------------------------
def pretrain(args, data, net):
    """Section 3.1: the net learns the visual tokens of masked patches -> the net."""
    x_all, y_all = data.training_images()
    side = x_all.shape[2] // args.patch
    count = round(args.masked * side**2)
    least = max(1, round(args.least_block * side**2))
    tokenizer = Tokenizer(x_all, args.codes, args.patch, args.tokenizer_images, args.seed)
    tokenizer.to(args.device)
    opt = adamw(net.train(), args.lr, 1.0, args.weight_decay)
    run = Run("mood_pt", args, MOOD, data, args.steps, {}, net=net, opt=opt, tokenizer=tokenizer)

    for step in range(run.step, args.steps):
        seed_step(args.seed, step)
        set_rates(opt, (step + 0.5) / args.steps, args.warm_up)
        x, _ = random_batch(x_all, y_all, args.batch_size)
        x = augment(x, args.mirror)
        rng = random.Random(int(torch.randint(2**62, ())))  # from the seed of this step
        masks = [blockwise_mask(side, count, least, rng).flatten() for _ in x]
        mask = torch.stack(masks).to(x.device)                            # (B, N)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            loss = mim_loss(net(x, mask), tokenizer(x), mask)
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(step, dict(loss=loss.detach()))
        run.save()
    return net.eval()

def finetune(args, data, name, net, lr, decay, steps, **more):
    """Section 3.2: the net learns the labels, into RUN/<name>.pt -> the net. decay: of the rate,
    from a layer to the one before; more: to record."""
    x_all, y_all = data.training_images()
    opt = adamw(net.train(), lr, decay, args.weight_decay)
    more.update(backbone=args.backbone)
    run = Run(name, args, {**MOOD, **FINETUNING}, data, steps, more, net=net, opt=opt)

    for step in range(run.step, steps):
        seed_step(args.seed, step)
        set_rates(opt, (step + 0.5) / steps, args.warm_up)
        x, y = random_batch(x_all, y_all, args.batch_size)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            loss = smoothed_loss(net(augment(x, args.mirror)), y, args.smoothing)
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(step, dict(loss=loss.detach()))
        run.save()
    return net.eval()

def mahalanobis(train, test, labels=None, kind="one"):
    """(f - mu)^T pinv(Sigma) (f - mu) of test features (M, D) given train features (N, D), labels
    (N,) -> (M,) float64, higher = further. kind "one": one Gaussian for all classes (the public
    code); "cc": mean and covariance of each class, the least distance; "shared": class means, one
    covariance (MOODv2, features not normalised). Covariances divide by N. Raises ValueError."""
    train = torch.as_tensor(train).detach().cpu().double()
    test = torch.as_tensor(test).detach().cpu().double()
    if kind not in ("one", "cc", "shared") or (kind != "one" and labels is None) or len(train) < 2:
        raise ValueError("no distance: one, or with labels cc, shared; of two features a class")
    labels = torch.zeros(len(train)) if kind == "one" else torch.as_tensor(labels).cpu()
    classes = [train[labels == c] for c in labels.unique()]
    if kind == "cc":
        distances = [mahalanobis(of_class, test) for of_class in classes]
        return torch.stack(distances).min(0).values

    means = [of_class.mean(0) for of_class in classes]                    # (D,) each
    centred = [of_class - mean for of_class, mean in zip(classes, means)]
    centred = torch.cat(centred)                                          # (N, D)
    covariance = centred.T @ centred / len(centred)                       # (D, D)
    # numpy's cut-off of 1e-15 lets the rounding of float32 features in, and of few images
    inverse = torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True)
    distances = []
    for mean in means:
        off = test - mean                                                 # (M, D)
        distances.append((off @ inverse * off).sum(1))
    return torch.stack(distances).amin(0)

def main(argv=None):
    """Train the stages, score the sets by each, write and print the numbers."""
    args, generator, data, sets = read_flags(argv)
    name = "mood" if args.backbone == "vit" else "mood_timm"
    title = "MOOD" if args.backbone == "vit" else args.backbone
    rows = {}
    more = {}
    held_out = *data.held_out_images(), None
    for stage, net in train_stages(args, data).items():
        scored = score(stage, net, *data.training_images(), {**sets, "held-out": held_out}, title)
        if stage == "pt+ft" and Path(args.run, "classifier.pt").exists():  # none beside --dev
            more["classifier"] = join_with_energy(args, data, scored, sets, title)
        scored.pop(("held-out", "C(x)"))
        rows.update(tabulate(scored, "C(x)", "C(x)"))
    settings = dict(generator=generator["settings"], mood=dict(vars(args), classes=data.classes))
    beside = [] if args.dev else ["results.json", "shift.json"]
    report(Path(args.run, f"{name}.json"), settings, sets, rows, beside, **more)

# --- Below: what serves it. ----------------------------------------------------------------------
def join_with_energy(args, data, scored, sets, title):
    """To each Scored the distances joined with the energy of the classifier that MoodCat protects,
    by the rule of paper.fair; that classifier's id. Raises OSError or ValueError."""
    classifier, its_id, _ = load_classifier(args.run, None, args.device, data.classes)
    images = {name: x for name, (x, _, _) in sets.items()}
    images["held-out"], _ = data.held_out_images()
    for (name, _), s in scored.items():
        s.scores["energy"] = predict(classifier, images[name], len(data.classes)).logsumexp(1).cpu()
    methods = [f"{title} pt+ft {distance}" for distance in ("one", "cc", "shared")]
    add_energy(scored, scored["held-out", "C(x)"].scores, methods)
    for s in scored.values():
        del s.scores["energy"]  # not MOOD's
    return its_id

def read_flags(argv):
    """The command line, the generator's checkpoint, the training split and the sets to score; for
    --dev a split of the other classes alone, and a folder of their own. Raises ValueError."""
    table = {**MOOD, **FINETUNING}
    parser = Parser(__doc__, table)
    add = parser.add_argument
    add("--backbone", default="vit", help="vit, or timm:NAME for weights of timm [%(default)s]")
    add("--ood", nargs="+", default=[], metavar="SET", help="as for evaluate.py")
    add("--dev", nargs="+", default=[], metavar="CLASS", help="known classes to take for unknown")
    args = parse(parser, argv, table)
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu")  # its backward is slow on a CPU
    _, generator = load_generator(args.run, args.device)
    data = training_split(args, generator)
    unknown = None
    if args.dev:
        data, unknown = without(args, data)
        args.run = str(Path(args.run, "-".join(["dev", *args.dev])))
    _, y = data.training_images()
    if y.bincount(minlength=len(data.classes)).min() < 2:
        raise ValueError("MOOD needs two training images of each class beside the held-out ones")
    return args, generator, data, choose_sets(args, data, unknown)

def without(args, data):
    """--dev: the training split without these classes, and their held-out images."""
    rest = [name for name in data.classes if name not in args.dev]
    if len(rest) < 2 or not set(args.dev) <= set(data.classes) or args.ood:
        raise ValueError(f"--dev, without --ood, must leave two of {', '.join(data.classes)}")
    taken = torch.tensor([name in args.dev for name in data.classes], device=args.device)
    x, y = data.held_out_images()
    return data.other("train", rest), x[taken[y]]

# --- The stages of Table 4 -----------------------------------------------------------------------
def train_stages(args, data):
    """{stage: net}, trained where missing."""
    if args.backbone != "vit":
        return train_timm(args, data)
    steps = args.finetune_steps
    lr = args.finetune_lr
    pt = pretrain(args, data, fresh_vit(args, data, args.codes))

    # the pretrained body under a fresh head, with a rate for each layer
    net = fresh_vit(args, data)
    net.load_state_dict({**pt.state_dict(), **net.head.state_dict(prefix="head.")})
    decay = args.finetune_decay**(1 / args.depth)
    pretrained = fingerprint(pt.state_dict())
    return {
        "neither": fresh_vit(args, data),
        "pt": pt,
        "ft": finetune(args, data, "mood_ft", fresh_vit(args, data), lr, 1.0, steps),
        "ft long": finetune(args, data, "mood_ft_long", fresh_vit(args, data), lr, 1.0,
                            args.steps + steps),
        "pt+ft": finetune(args, data, "mood_pt_ft", net, lr, decay, steps, pretrained=pretrained)}

def fresh_vit(args, data, outputs=None):
    """A ViT at its random start, the same every time but for the head; outputs: [classes]."""
    torch.manual_seed(args.seed)
    net = ViT(outputs or len(data.classes), data.x.shape[2], data.channels, args.width, args.depth,
              args.heads, args.patch)
    return net.to(args.device).eval()

def train_timm(args, data):
    """A pretrained net of timm as it is (Table 4's second row), and fine-tuned (its last)."""
    torch.manual_seed(args.seed)  # timm draws a head
    name = args.backbone.removeprefix("timm:")
    pt = TimmNet(name, len(data.classes)).to(args.device)
    net = TimmNet(name, len(data.classes)).to(args.device)
    pt_ft = finetune(args, data, "mood_timm", net, args.timm_lr, args.timm_decay,
                     args.finetune_steps)
    return {"pt": pt.eval(), "pt+ft": pt_ft}

def adamw(net, lr, decay, weight_decay):
    """AdamW with the rates of layer_groups(), averaged over torchrun's processes."""
    groups = layer_groups(net, lr, decay)
    return averaged(torch.optim.AdamW(groups, weight_decay=weight_decay))

def layer_groups(net, rate, decay):
    """AdamW's groups with a rate for each layer, rate * decay**(L + 1 - l): l = 0 for patches and
    positions, 1 to L for the blocks, L + 1 for norm and head."""
    layers = {}
    for name, p in net.named_parameters():
        part = re.search(r"\bblocks\.(\d+)\.|\b(?:norm|fc_norm|head)\.", name)
        layer = int(part[1] or 999) + 1 if part else 0
        layers.setdefault(layer, []).append(p)
    groups = []
    for i, layer in enumerate(sorted(layers, reverse=True)):
        groups.append(dict(params=layers[layer], peak=rate * decay**i))
    return groups

def set_rates(opt, done, warm_up):
    """After a share `done` of the training: up along a line, then down along a cosine to 0."""
    share = min(done / max(warm_up, 1e-9), (1 + math.cos(math.pi * done)) / 2)
    for group in opt.param_groups:
        group["lr"] = group["peak"] * share

# --- Pretext task: predict the visual tokens of masked patches (section 3.1, BEiT) ---------------
def blockwise_mask(side, count, least, rng):
    """BEiT's mask of a (side, side) grid of patches -> bool, True = masked, `count` at most. Blocks
    of at least `least` patches, while as many are left; an overlap counts once. rng: random.Random,
    drawn in the order area, log-aspect, top, left. Ten blocks in a row that do not fit end it."""
    mask = np.zeros((side, side), bool)
    left = count
    tries = 0
    while left and tries < 10:
        area = rng.uniform(least, left)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        tries += 1
        if h >= side or w >= side:
            continue
        i = rng.randint(0, side - h)
        j = rng.randint(0, side - w)
        block = mask[i:i + h, j:j + w]
        new = h * w - block.sum()
        if 0 < new <= left:
            block[:] = True
            left -= new
            tries = 0
    return torch.from_numpy(mask)

def to_patches(x, patch):
    """x (B, C, S, S) -> (B, N, C * patch**2), N = (S / patch)**2, row by row."""
    return F.unfold(x, patch, stride=patch).transpose(1, 2)

class Tokenizer(nn.Module):
    """Visual tokens: of each patch the nearest of `codes` k-means centroids (BEiT: a dVAE) of up to
    `most` uint8 images (N, C, S, S); x (B, C, S, S) in [-1, 1] -> (B, N) in [0, codes). Raises
    ValueError."""
    def __init__(self, images, codes, patch=4, most=1000, seed=0):
        from sklearn.cluster import KMeans
        super().__init__()
        self.patch = patch
        rows = np.random.default_rng(seed).permutation(len(images))[:most]
        x = to_float(images.cpu()[rows])
        patches = to_patches(x, patch).flatten(0, 1).numpy()
        centroids = KMeans(codes, n_init=1, random_state=seed).fit(patches).cluster_centers_
        self.register_buffer("centroids", torch.from_numpy(centroids))

    def forward(self, x):
        return torch.cdist(to_patches(x, self.patch), self.centroids[None]).argmin(2)

def mim_loss(logits, tokens, mask):
    """-mean over masked patches of log p(token | masked x): logits (B, N, codes), tokens (B, N),
    mask (B, N) bool, True = masked -> scalar. The other patches play no part."""
    return F.cross_entropy(logits[mask].float(), tokens[mask])

def smoothed_loss(logits, y, alpha=0.1):
    """Cross-entropy against y (1 - alpha) + alpha / K (Eq. 1): logits (B, K), y (B,) -> scalar."""
    return F.cross_entropy(logits.float(), y, label_smoothing=alpha)

# --- Networks ------------------------------------------------------------------------------------
class ViT(nn.Module):
    """Vision transformer without class token and BEiT's relative positions, layer scale, drop path:
    x (B, C, S, S) in [-1, 1] -> logits (B, outputs) of f = LayerNorm(mean of patch tokens); given a
    mask (B, N), True = masked, of each patch: (B, N, outputs)."""
    def __init__(self, outputs, image_size, channels, width, depth, heads, patch=4):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.positions = nn.Parameter(0.02 * torch.randn((image_size // patch)**2, width))
        blocks = [nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, norm_first=True,
                                             activation="gelu", batch_first=True)
                  for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def tokens(self, x, mask=None):
        t = self.embed(to_patches(x, self.patch))                         # (B, N, width)
        if mask is None:
            mask = torch.zeros_like(t[..., 0], dtype=torch.bool)
        t = torch.where(mask[:, :, None], self.mask_token.to(t.dtype), t)
        return self.blocks(t + self.positions)                            # (B, N, width)

    def features(self, x):
        return self.norm(self.tokens(x).mean(1))                          # (B, width)

    def forward(self, x, mask=None):
        if mask is None:
            return self.head(self.features(x))
        return self.head(self.norm(self.tokens(x, mask)))

class TimmNet(nn.Module):
    """A pretrained net of the optional package timm: x (B, 1 or 3, S, S) in [-1, 1], so BEiT's mean
    and deviation of 0.5 -> logits (B, num_classes). Raises OSError."""
    def __init__(self, name, num_classes):
        super().__init__()
        try:
            import timm
            self.net = timm.create_model(name, pretrained=True, num_classes=num_classes)
            self.side = self.net.patch_embed.img_size[0]
            self.head = self.net.get_classifier()
            if self.net.global_pool != "avg" or {*self.net.pretrained_cfg["mean"]} != {0.5}:
                raise ValueError("it averages no patch tokens, or takes no images in [-1, 1]")
        except Exception as error:  # no timm, unknown names, downloads, nets of another kind
            raise OSError(f"no timm:{name}, a BEiT of timm (pip install timm): {error}") from error

    def features(self, x):
        # as in the public code: resize to 256, keep the centre's 224
        i = self.side // 14
        large = F.interpolate(x.expand(-1, 3, -1, -1), (self.side + 2 * i,) * 2, mode="bicubic")
        x = large.clamp(-1, 1)[..., i:i + self.side, i:i + self.side]     # (B, 3, side, side)
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    def forward(self, x):
        return self.head(self.features(x))

# --- Scores (section 3.4, Table 5) ---------------------------------------------------------------
@torch.no_grad()
def score(stage, net, x_all, y_all, sets, title="MOOD"):
    """The sets by the net of a stage, {(set, "C(x)"): Scored} for tabulate(), given uint8 training
    images x_all (N, C, S, S), as they are, and labels y_all (N,)."""
    train = features(net, x_all)
    train_unit = normalise(train)
    scored = {}
    for name, (x, truth, _) in sets.items():
        f = features(net, x)
        unit = normalise(f)
        logits = net.head(f)
        scores = {"one": -mahalanobis(train_unit, unit),
                  "cc": -mahalanobis(train_unit, unit, y_all, "cc"),
                  "shared": -mahalanobis(train, f, y_all, "shared")}
        if stage == "pt+ft":
            scores.update(logit_scores(logits, f))
        if "ft" not in stage:  # no head for y: it predicts the nearest class
            near = [-mahalanobis(train_unit[y_all == c], unit) for c in y_all.unique()]
            logits = torch.stack(near, 1)
        scores = {f"{title} {stage} {method}": s.cpu() for method, s in scores.items()}
        scored[name, "C(x)"] = Scored(truth.cpu(), logits.argmax(1).cpu(), scores)
    return scored

def features(net, x):
    """uint8 images x (N, C, S, S) -> features (N, D)."""
    return torch.cat([net.features(to_float(part)).float() for part in x.split(256)])

def normalise(features):
    """features (N, D) -> the same directions, of length 1 (N, D)."""
    features = torch.as_tensor(features)
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)

def logit_scores(logits, features):
    """Table 5's other metrics, higher = in-distribution: logits (M, K), features (M, D) -> {name:
    (M,)}. GradNorm: L1 norm of d KL(uniform || p) / dW of the last layer, of each image."""
    log_p = logits.log_softmax(1)
    p = logits.softmax(1)
    grad_norm = (p - 1 / p.shape[1]).abs().sum(1) * features.abs().sum(1)
    return {"softmax": log_p.amax(1), "entropy": (p * log_p).sum(1),
            "energy": logits.logsumexp(1), "GradNorm": grad_norm}

if __name__ == "__main__":
    run_script(main)
