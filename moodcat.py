"""MoodCat: out-of-distribution detection by semantic mismatch under masking (Yang et al., 2022).

For a classifier C and an image x with prediction y = C(x): mask a random part of x, synthesise a
whole image x' from what is left and y, and measure how far x' is from x. An in-distribution image
comes back as itself, an OOD image as something of class y. This file is the method, in the order
of Figure 2; train_gen.py and train_scorer.py train it, evaluate.py measures it.

    symbol     meaning                                     shape, range
    x          image                                       (B, C, H, W) float in [-1, 1]
    y          class label the synthesis is conditioned on (B,) int64 in [0, num_classes)
    M, x_m     mask; masked image, mid-grey (0) where M    (B, 1, H, W) bool, True = removed
    mu, logvar E(x_m): mean and log-variance of z          (B, 128)
    z          latent code, mu + exp(logvar / 2) * eps     (B, 128)
    x'         synthesis G(x_m, y) = D(z, y)               (B, C, H, W) float in [-1, 1]
    D^Unet     U-Net discriminator: image and pixel logits (B,) and (B, 1, H, W)
    C_b        conditional binary classifier, a scorer     (B,), higher = in-distribution
    p          conformal p-value of a score                (B,), small = unlike in-distribution
    ch         channel multiplier, 32 in the paper
"""

import io
import math
import warnings
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

# --- Masking (section 3.3, Table 5) --------------------------------------------------------------
def random_mask(x, ratio=(0.1, 0.3), generator=None, u=None):
    """Remove a random rectangle of each image x (B, C, H, W) (section 3.3). ratio: share of the
    area, a range or one number; generator: a CPU torch.Generator; u (B, 3): its numbers, if given.
    Returns x_m (B, C, H, W), 0 where removed; mask (B, 1, H, W), True = removed; or ValueError."""
    low, high = ratio if isinstance(ratio, (tuple, list)) else (ratio, ratio)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1], the smaller number first")
    H, W = x.shape[2:]
    u = torch.rand(len(x), 3, generator=generator) if u is None else u  # which, how far down, right
    sides = _rectangles(H, W, low, high)                                      # (S, 2)
    h, w = sides[(u[:, 0] * len(sides)).long()].T[:, :, None]                 # (B, 1) each
    top, left = (u[:, 1:2] * (H - h + 1)).long(), (u[:, 2:3] * (W - w + 1)).long()
    rows, cols = torch.arange(H), torch.arange(W)
    in_rows = (rows >= top) & (rows < top + h)                                # (B, H)
    in_cols = (cols >= left) & (cols < left + w)                              # (B, W)
    mask = (in_rows[:, None, :, None] & in_cols[:, None, None, :]).to(x.device)  # (B, 1, H, W)
    return x.masked_fill(mask, 0.0), mask

@lru_cache
def _rectangles(H, W, low, high):
    """Every (h, w) with an aspect of 0.4 to 2.5 (authors: 0.5 to 2.5) and an area inside the ratio,
    or else nearest to it. Equal chances for each make area uniform and aspect log-uniform."""
    sides = [(h, w) for h in range(1, H + 1) for w in range(1, W + 1) if 0.4 <= h / w <= 2.5]
    off = [max(low * H * W - h * w, h * w - high * H * W, 0) for h, w in sides]
    least = min(off)
    return torch.tensor([s for s, d in zip(sides, off) if d == least] if high else [(0, 0)])

class ImageMask:
    """The detector's mask f(x, i) -> (x_m, M): the i-th random_mask of an image, which depends on
    its pixels and the seed alone, so that its score does not depend on batch, order or process."""
    def __init__(self, ratio=(0.1, 0.3), seed=0):
        self.settings = dict(ratio=ratio, seed=seed)

    def __call__(self, x, i=0):
        pixels = ((x + 1) * 127.5).round().byte().cpu().numpy()  # 8 bits: equal on every device
        crcs = (zlib.crc32(image.tobytes(), 1000 * self.settings["seed"] + i) for image in pixels)
        u = [torch.rand(3, generator=torch.Generator().manual_seed(crc)) for crc in crcs]
        return random_mask(x, self.settings["ratio"], u=torch.stack(u))

# --- Encoder (section 3.4, appendix A.2) ---------------------------------------------------------
class Encoder(nn.Module):
    """E: x_m (B, channels, S, S) -> mu, logvar (B, z_dim), the Gaussian of z; the paper's Sigma is
    exp(logvar / 2). Both heads are trained; the authors' code left them at their start."""
    def __init__(self, ch=32, image_size=32, channels=3, z_dim=128):
        super().__init__()
        conv = lambda cin, cout, *how: nn.Conv2d(cin, cout, *how, bias=False)
        self.features = nn.Sequential(
            conv(channels, ch, 4, 2, 1), nn.LeakyReLU(0.2),                   # S/2
            conv(ch, 2 * ch, 4, 2, 1), nn.BatchNorm2d(2 * ch), nn.LeakyReLU(0.2),
            conv(2 * ch, 4 * ch, 4, 2, 1), nn.BatchNorm2d(4 * ch), nn.LeakyReLU(0.2),
            conv(4 * ch, 4 * ch, image_size // 8), nn.LeakyReLU(0.2), nn.Flatten())
        self.mu, self.logvar = nn.Linear(4 * ch, z_dim), nn.Linear(4 * ch, z_dim)

    def forward(self, x_m):
        h = self.features(x_m)                                                # (B, 4ch)
        return self.mu(h), self.logvar(h)                                     # 2 x (B, z_dim)

def kl_divergence(mu, logvar):
    """D_KL[N(mu, Sigma) || N(0, 1)] in nats, summed over z (Eq. 1): 2 x (B, z_dim) -> (B,)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)

# --- Decoder (section 3.4: BigGAN blocks with class-conditional batch norm) ----------------------
def _sn(layer):
    """BigGAN's recipe for every learned layer: orthogonal start, spectral norm."""
    nn.init.orthogonal_(layer.weight)
    return parametrizations.spectral_norm(layer)

class ConditionalBatchNorm(nn.Module):
    """x (B, C, H, W), class embedding e (B, E) -> (1 + gain(e)) * norm(x) + bias(e), [5]."""
    def __init__(self, channels, embed_dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = _sn(nn.Linear(embed_dim, channels, bias=False))
        self.bias = _sn(nn.Linear(embed_dim, channels, bias=False))

    def forward(self, x, e):
        gain, bias = 1 + self.gain(e), self.bias(e)                           # (B, channels)
        return torch.addcmul(bias[:, :, None, None], gain[:, :, None, None], self.norm(x))

class UpBlock(nn.Module):
    """Residual block that doubles the side: (B, cin, S, S) -> (B, cout, 2S, 2S). With embed_dim,
    class-conditional batch norm before each activation (decoder); without, none (D^Unet)."""
    def __init__(self, cin, cout, embed_dim=None):
        super().__init__()
        self.norm1 = ConditionalBatchNorm(cin, embed_dim) if embed_dim else None
        self.norm2 = ConditionalBatchNorm(cout, embed_dim) if embed_dim else None
        self.conv1 = _sn(nn.Conv2d(cin, cout, 3, padding=1))
        self.conv2 = _sn(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = _sn(nn.Conv2d(cin, cout, 1))

    def forward(self, x, e=None):
        h = F.relu(self.norm1(x, e) if self.norm1 else x)                     # (B, cin, S, S)
        h = self.conv1(F.interpolate(h, scale_factor=2))                      # (B, cout, 2S, 2S)
        h = self.conv2(F.relu(self.norm2(h, e) if self.norm2 else h))
        # a 1x1 convolution commutes with nearest-neighbour upsampling: convolve the small side
        return h + F.interpolate(self.skip(x), scale_factor=2)

class Decoder(nn.Module):
    """D: z (B, z_dim), y (B,) -> x' (B, channels, S, S) in [-1, 1]. The label enters through the
    batch norms alone, so z gives the template and y the class (section 3.4)."""
    def __init__(self, num_classes, ch=32, image_size=32, channels=3, z_dim=128):
        super().__init__()
        self.side = image_size // 8
        self.embed = nn.Embedding(num_classes, 128)
        nn.init.orthogonal_(self.embed.weight)
        self.first = _sn(nn.Linear(z_dim, 16 * ch * self.side**2))
        self.blocks = nn.ModuleList([UpBlock(16 * ch, 8 * ch, 128), UpBlock(8 * ch, 4 * ch, 128),
                                     UpBlock(4 * ch, ch, 128)])
        self.last = nn.Sequential(nn.BatchNorm2d(ch), nn.ReLU(),
                                  _sn(nn.Conv2d(ch, channels, 3, padding=1)), nn.Tanh())

    def forward(self, z, y):
        e = self.embed(y)                                                     # (B, 128)
        h = self.first(z).unflatten(1, (-1, self.side, self.side))            # (B, 16ch, S/8, S/8)
        for block in self.blocks:
            h = block(h, e)                                                   # 8ch, 4ch, ch
        return self.last(h)                                                   # (B, channels, S, S)

def _checked(**settings):
    """The settings of a net, or a ValueError for those that no net has; nothing is built yet."""
    most = dict(num_classes=100_000, ch=256, image_size=512, channels=3, z_dim=4096)
    for k, v in settings.items():
        if type(v) is not int or not 1 <= v <= most[k] or (k, v) == ("channels", 2):
            raise ValueError(f"{k} cannot be {v!r}: a whole number to {most[k]}, channels 1 or 3")
        if k == "image_size" and (v % 8 or v < 16):
            raise ValueError(f"image size {v} must be a multiple of 8, at least 16")
    return settings

class Generator(nn.Module):
    """G = D(E(.), y), the whole synthesis (section 3.4): x_m (B, channels, S, S) in [-1, 1], y (B,)
    -> x' (B, channels, S, S), mu, logvar (B, z_dim). train() samples z; eval() takes mu, which is
    repeatable. conditional=False (Table 6): one embedding for all classes. Raises ValueError."""
    def __init__(self, num_classes, ch=32, image_size=32, channels=3, z_dim=128, conditional=True):
        super().__init__()
        self.settings = dict(_checked(num_classes=num_classes, ch=ch, image_size=image_size,
                                      channels=channels, z_dim=z_dim), conditional=conditional)
        self.encoder = Encoder(ch, image_size, channels, z_dim)
        self.decoder = Decoder(num_classes if conditional else 1, ch, image_size, channels, z_dim)

    def forward(self, x_m, y):
        mu, logvar = self.encoder(x_m)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu) if self.training else mu
        return self.decoder(z, y if self.settings["conditional"] else y * 0), mu, logvar

# --- Discriminator (section 3.4, appendix A; U-Net GAN = reference [40]) -------------------------
class DownBlock(nn.Module):
    """Block of D^Unet and C_b: (B, cin, S, S) -> (B, cout, S/2, S/2), S with down=False."""
    def __init__(self, cin, cout, first=False, down=True):
        super().__init__()
        self.first, self.down = first, down
        self.conv1 = _sn(nn.Conv2d(cin, cout, 3, padding=1))
        self.conv2 = _sn(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = _sn(nn.Conv2d(cin, cout, 1)) if down or cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # pooling commutes with the 1x1 skip
        return h + self.skip(x)

class Projection(nn.Module):
    """Conditional logit w . h + b + embed(y) . h (Miyato and Koyama [30]): h (B, width) or
    (B, width, H, W), y (B,) -> (B,) or (B, H, W)."""
    def __init__(self, width, num_classes):
        super().__init__()
        self.linear = _sn(nn.Linear(width, 1))
        self.embed = _sn(nn.Embedding(num_classes, width))

    def forward(self, h, y):
        weight = self.linear.weight + self.embed(y)                           # (B, width)
        return torch.einsum("bc,bc...->b...", weight, h) + self.linear.bias

class UNetDiscriminator(nn.Module):
    """D^Unet: is an image of class y real, as a whole and pixel by pixel (appendix A.1)? x (B,
    channels, S, S), y (B,) -> logit (B,), pixel_logits (B, 1, S, S), positive for real. Both heads
    see y: Eq. 5 writes D_dec(x', y), Eq. 6 D_dec(x'); the authors' code conditions both."""
    def __init__(self, num_classes, ch=32, channels=3):
        super().__init__()
        self.down1 = DownBlock(channels, ch, first=True)
        self.down2 = DownBlock(ch, 4 * ch)
        self.down3 = DownBlock(4 * ch, 16 * ch)
        self.up1, self.up2 = UpBlock(16 * ch, 4 * ch), UpBlock(8 * ch, ch)
        self.up3 = UpBlock(2 * ch, ch)
        self.image_head = Projection(16 * ch, num_classes)
        self.pixel_head = Projection(ch, num_classes)

    def forward(self, x, y):
        h1 = self.down1(x)                                                    # (B, ch, S/2, S/2)
        h2 = self.down2(h1)                                                   # (B, 4ch, S/4, S/4)
        h3 = self.down3(h2)                                                   # (B, 16ch, S/8, S/8)
        logit = self.image_head(F.relu(h3).sum((2, 3)), y)                    # (B,)
        u = self.up1(h3)                                                      # (B, 4ch, S/4, S/4)
        u = self.up2(torch.cat([u, h2], 1))                                   # (B, ch, S/2, S/2)
        u = self.up3(torch.cat([u, h1], 1))                                   # (B, ch, S, S)
        return logit, self.pixel_head(F.relu(u), y)[:, None]                  # (B, 1, S, S)

# --- Losses (Eq. 2 to 6). -log sigmoid(l) is softplus(-l); -log(1 - sigmoid(l)) is softplus(l). --
def discriminator_loss(real_logit, real_pixels, fake_logit, fake_pixels):
    """Eq. 3 = Eq. 4 (image) + Eq. 5 (pixels): logits (B,), pixel logits (B, 1, H, W) -> scalar. Eq.
    5 sums over pixels; the mean, as in the authors' code, keeps both terms alike at any size."""
    return (F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()
            + F.softplus(-real_pixels).mean() + F.softplus(fake_pixels).mean())

def generator_loss(fake_logit, fake_pixels, x_fake, x, adv=1.0, l1=1.0, l2=1.0, ssim_weight=1.0):
    """Eq. 6: fool both heads and resemble x: logits (B,), pixel logits (B, 1, H, W), images (B, C,
    H, W) -> scalar. Eq. 6 adds SSIM, which falls as images differ: 1 - SSIM is meant."""
    adversarial = F.softplus(-fake_logit).mean() + F.softplus(-fake_pixels).mean()
    return (adv * adversarial + l1 * F.l1_loss(x_fake, x) + l2 * F.mse_loss(x_fake, x)
            + ssim_weight * (1 - ssim(x_fake, x).mean()))

def hinge_loss(right, wrong):
    """Eq. 2: C_b's scores of right-label and of wrong-label pairs, (B,) each -> scalar."""
    return F.relu(1 - right).mean() + F.relu(1 + wrong).mean()

def ssim(x, y):
    """Structural similarity of images (B, C, H, W) in [-1, 1], sides from 11 -> (B,), 1 = equal.
    11 x 11 Gaussian window, sigma 1.5, valid convolution, C1 = 0.01^2, C2 = 0.03^2 on [0, 1]."""
    g = torch.exp(-(torch.arange(11, device=x.device, dtype=x.dtype) - 5).square() / (2 * 1.5**2))
    g = g / g.sum()
    # a valid convolution along one axis, as an (n - 10, n) matrix
    band = lambda n: torch.stack([F.pad(g, (i, n - 11 - i)) for i in range(n - 10)])
    rows, cols = band(x.shape[2]), band(x.shape[3]).T
    x, y = (x + 1) / 2, (y + 1) / 2
    mx, my, xx, yy, xy = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ cols
    value = ((2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
             / ((mx * mx + my * my + 1e-4) * (xx - mx * mx + yy - my * my + 9e-4)))
    return value.mean((1, 2, 3))

# --- Scorers (section 3.5): f(x, x', y) -> (B,), higher = in-distribution ------------------------
class BinaryScorer(nn.Module):
    """C_b (Figure 3), BigGAN's small discriminator: does x', made for y, show what x shows? x, x'
    (B, channels, S, S), y (B,) -> (B,), higher = in-distribution (the authors: lower)."""
    def __init__(self, num_classes, ch=32, channels=3):
        super().__init__()
        self.settings = _checked(num_classes=num_classes, ch=ch, channels=channels)
        self.blocks = nn.Sequential(
            DownBlock(2 * channels, 2 * ch, first=True), DownBlock(2 * ch, 2 * ch),
            DownBlock(2 * ch, 2 * ch, down=False), DownBlock(2 * ch, 2 * ch, down=False))
        self.head = Projection(2 * ch, num_classes)

    def forward(self, x, x_fake, y):
        h = self.blocks(torch.cat([x, x_fake], 1))                            # (B, 2ch, S/4, S/4)
        return self.head(F.relu(h).sum((2, 3)), y)                            # (B,)

WEIGHT_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth",
                "squeeze": "squeezenet1_1-b8a52dc0.pth", "dists": "dists_alpha_beta.pt"}
DISTS_URL = "https://raw.githubusercontent.com/dingkeyan93/DISTS/master/DISTS_pytorch/weights.pt"

def _pretrained(name, load):
    """load(), which may download WEIGHT_FILES[name]; a failure says in a line what to do."""
    try:
        with warnings.catch_warnings():  # lpips calls torchvision by its old keyword
            warnings.simplefilter("ignore", UserWarning)
            return load()
    except Exception as error:  # downloads and damaged files fail in many ways
        raise OSError(f"no usable {WEIGHT_FILES[name]} ({str(error)[:200]}): put it into "
                      f"{torch.hub.get_dir()}/checkpoints, or use --scorers cb ssim") from error

def _for_perception(x):
    """Grey to three channels, sides under 32 to 32: the pretrained nets know nothing smaller."""
    small = min(x.shape[2:]) < 32
    x = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False) if small else x
    return x.expand(-1, 3, -1, -1)

class LPIPS(nn.Module):
    """Perceptual distance of Zhang et al. [53], by the lpips package; net "vgg" (that of Table 13),
    "alex" or "squeeze". x, x' (B, 1 or 3, H, W) in [-1, 1] -> (B,), 0 = equal. Raises OSError."""
    def __init__(self, net="vgg"):
        super().__init__()
        import lpips  # takes a second; detectors without it start faster
        self.metric = _pretrained(net, lambda: lpips.LPIPS(net=net, verbose=False))

    def forward(self, x, x_fake):
        return self.metric(_for_perception(x), _for_perception(x_fake)).flatten()

class DISTS(nn.Module):
    """Structure and texture distance of Ding et al. [8], on torchvision's VGG16: x, x' (B, 1 or 3,
    H, W) in [-1, 1] -> (B,), 0 = equal. In the image and five stages, channel means compare texture
    (S1) and covariances structure (S2), mixed by learned weights alpha, beta. Raises OSError."""
    def __init__(self):
        super().__init__()
        from torchvision import models, transforms
        vgg = _pretrained("vgg", lambda: models.vgg16(weights="IMAGENET1K_V1")).features
        # cut at the max pools: L2 pooling takes their place
        self.stages = nn.ModuleList([vgg[0:4], vgg[5:9], vgg[10:16], vgg[17:23], vgg[24:30]])
        learned = _pretrained("dists", lambda: torch.hub.load_state_dict_from_url(
            DISTS_URL, map_location="cpu", file_name=WEIGHT_FILES["dists"], weights_only=True))
        window = torch.hann_window(5, periodic=False)[1:-1]
        self.register_buffer("alpha", learned["alpha"].flatten())             # (1475,)
        self.register_buffer("beta", learned["beta"].flatten())
        self.register_buffer("window", torch.outer(window, window) / window.sum()**2)
        self.normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def _features(self, x):
        x = (_for_perception(x) + 1) / 2  # DISTS takes [0, 1]
        features, h = [x], self.normalise(x)
        for i, stage in enumerate(self.stages):
            if i:
                window = self.window.expand(h.shape[1], 1, 3, 3)
                h = F.conv2d(h.square(), window, stride=2, padding=1, groups=h.shape[1])
            h = stage((h + 1e-12).sqrt() if i else h)
            features.append(h)
        return features

    def forward(self, x, x_fake):
        s1, s2, c = [], [], 1e-6
        for a, b in zip(self._features(x), self._features(x_fake)):
            ma, mb = a.mean((2, 3)), b.mean((2, 3))                           # (B, C)
            va, vb = a.var((2, 3), correction=0), b.var((2, 3), correction=0)
            cov = (a * b).mean((2, 3)) - ma * mb
            s1.append((2 * ma * mb + c) / (ma.square() + mb.square() + c))
            s2.append((2 * cov + c) / (va + vb + c))
        similarity = torch.cat(s1, 1) @ self.alpha + torch.cat(s2, 1) @ self.beta
        return 1 - similarity / (self.alpha.sum() + self.beta.sum())

def _minus(distance):
    """A distance (x, x') -> (B,) as a scorer."""
    fold(distance)
    return lambda x, x_fake, y: -distance.to(x.device)(x, x_fake)

def _energy(settings, classifier):
    """The classifier's energy, which the paper does not have: neither x' nor y plays a part."""
    if classifier is None:
        raise ValueError("the scorer energy needs the classifier: give it, too")
    return lambda x, x_fake, y: classifier(x).float().logsumexp(1)

# name: (settings of a trained one, classifier) -> scorer; for --scorers, MoodCat.save and .load
SCORERS = {"cb": lambda settings, classifier: BinaryScorer(**settings),
           "cb_extra": lambda settings, classifier: BinaryScorer(**settings),
           "ssim": lambda settings, classifier: lambda x, x_fake, y: ssim(x, x_fake),
           "lpips": lambda settings, classifier: _minus(LPIPS("vgg")),
           "lpips-alex": lambda settings, classifier: _minus(LPIPS("alex")),
           "lpips-squeeze": lambda settings, classifier: _minus(LPIPS("squeeze")),
           "dists": lambda settings, classifier: _minus(DISTS()),
           "energy": _energy}

# --- From scores to one verdict (section 3.5): conformal p-values, joined ------------------------
# any scorer that flags rejects, as in the paper; and the sum of log p (Fisher's method)
RULES = {"min-p": lambda log_p: log_p.min(0).values, "fisher": lambda log_p: log_p.sum(0)}

def log_p_values(scores, held_out):
    """log p of scores (B,), conformal by held-out in-distribution scores (n,): (B,) float64 on the
    CPU. p is how many of those are no higher, over n + 1: linear between them, above them towards
    1, below an exponential tail, the lowest tenth's mean excess; NaN for a score not finite."""
    s, h = scores.detach().cpu().double(), held_out.cpu().double().sort().values
    s, tenth = torch.where(s.isfinite(), s, torch.nan), len(h) // 10 + 1
    excess = (h[min(tenth, len(h) - 1)] - h[:tenth]).mean().clamp(min=1e-9)
    h, counts = h.unique(return_counts=True)
    p = counts.cumsum(0) / (counts.sum() + 1)
    below = p[0].log() - (h[0] - s) / excess
    above = 1 - (1 - p[-1]) / (1 + (s - h[-1]) / (h[-1] - h[0]).clamp(min=1e-9))
    inside = torch.from_numpy(np.interp(s, h, p))
    log_p = torch.where(s < h[0], below, torch.where(s > h[-1], above, inside).log())
    return log_p + 0 * s  # NaN stays NaN

def join(scores, held_out):
    """Scores {name: (B,)}, held-out scores {name: (n,)} -> {rule: (B,)} on the scores' device."""
    log_p = torch.stack([log_p_values(scores[name], held_out[name]) for name in held_out])
    device = next(iter(scores.values())).device
    return {rule: f(log_p).float().to(device) for rule, f in RULES.items()}

def fit_calibration(scores, tpr=0.95):
    """From scores {name: (n,)} of held-out in-distribution images under y = C(x): the even images'
    for join(), and each rule's threshold, at which the odd ones promise that a share of at least
    `tpr` of fresh images is accepted, whatever the scorers. Raises ValueError."""
    if not all(s.isfinite().all() for s in scores.values()):
        raise ValueError("a held-out image has a score that is not finite: check the scorers")
    even, odd = ({name: s[half::2].cpu().clone() for name, s in scores.items()} for half in (0, 1))
    n = len(next(iter(odd.values())))
    # accepting down to the k-th largest of n accepts a fresh image with probability k / (n + 1)
    k = math.ceil(tpr * (n + 1) - 1e-9)
    if not 0 < tpr < 1 or k > n:
        raise ValueError(f"{n} held-out images (half of them) cannot fix a TPR of {tpr}: give more")
    threshold = {rule: s.topk(k).values[-1].item() for rule, s in join(odd, even).items()}
    return dict(held_out=even, threshold=threshold, tpr=tpr)

# --- Detector (Figure 2) -------------------------------------------------------------------------
def fold(net):
    """net, in place, for inference: eval(), no gradients, spectral norms folded into weights."""
    net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    for module in list(net.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return net

class MoodCat:
    """The detector, for any classifier: x is rejected when its synthesis under y = C(x) differs.
    scorers: {name: f}, f(x, x', y) -> (B,), higher = in-distribution; mask: f(x, i) -> (x_m, M); a
    score is the mean over i = 0 to masks - 1 (the paper: 1); rule: the one of RULES for is_ood().
    Nets, the trained generator among them, are folded. Raises ValueError."""
    def __init__(self, generator, scorers, mask=None, masks=1, rule="fisher"):
        if not scorers or rule not in RULES or masks < 1:
            raise ValueError(f"a detector needs a scorer, a mask, a rule of {', '.join(RULES)}")
        self.generator, self.scorers = fold(generator), dict(scorers)
        self.mask, self.masks, self.rule = mask or ImageMask(), masks, rule
        self.device = next(generator.parameters()).device
        self.calibration = None  # what calibrate() fixes
        for f in self.scorers.values():
            if isinstance(f, nn.Module):
                fold(f.to(self.device))
            if isinstance(f, BinaryScorer) and any(
                    f.settings[k] != generator.settings[k] for k in ("num_classes", "channels")):
                raise ValueError(f"C_b is for {f.settings}, the generator for {generator.settings}")

    def synthesise(self, x, y, i=0):
        """Figure 2: x (B, C, S, S), y (B,) -> {scorer: (B,)}, x_m, x', by the i-th mask."""
        x_m, _ = self.mask(x, i)                                                 # M
        x_fake, _, _ = self.generator(x_m, y)                                 # G = D(E(.), y)
        return {name: f(x, x_fake, y) for name, f in self.scorers.items()}, x_m, x_fake

    @torch.no_grad()
    def score(self, x, y):
        """Scores of images x (B, C, S, S) float in [-1, 1] under labels y (B,), normally C(x):
        {name: (B,)}, higher = in-distribution; once calibrated, of RULES too. Raises ValueError."""
        x, y = self._check(x, y)
        scores = {name: torch.zeros(len(x), device=self.device) for name in self.scorers}
        chunk = 512 if x.is_cuda else 32  # on a CPU small chunks stay in the cache
        for part in (slice(i, i + chunk) for i in range(0, len(x), chunk)):
            for i in range(self.masks):
                for name, value in self.synthesise(x[part], y[part], i)[0].items():
                    scores[name][part] += value / self.masks
        if self.calibration:
            scores.update(join(scores, self.calibration["held_out"]))
        return scores

    def calibrate(self, x, y, tpr=0.95, **about):
        """Fix p-values and thresholds on held-out in-distribution images x (n, C, S, S), y = C(x);
        `about` is kept with them. Returns self; raises ValueError."""
        scores = {name: s for name, s in self.score(x, y).items() if name in self.scorers}
        self.calibration = dict(fit_calibration(scores, tpr), about=about)
        return self

    def is_ood(self, x, y):
        """True where rejected: x (B, C, S, S) in [-1, 1], y (B,) = C(x) -> bool (B,)."""
        if not self.calibration:
            raise ValueError("calibrate the detector before asking for verdicts")
        return self.rejects(self.score(x, y))

    def rejects(self, scores):
        """What score() returned -> bool (B,); a score that is not finite rejects."""
        return ~(scores[self.rule] >= self.calibration["threshold"][self.rule])

    def _check(self, x, y):
        """Images and labels on the detector's device, or a ValueError that says what is wrong."""
        K, S, C = (self.generator.settings[k] for k in ("num_classes", "image_size", "channels"))
        if not torch.is_tensor(x) or not x.is_floating_point():
            raise ValueError("images must be a float tensor in [-1, 1]; for uint8, x / 127.5 - 1")
        if x.shape[1:] != (C, S, S) or not len(x):
            raise ValueError(f"images are {tuple(x.shape)}, the detector takes (B, {C}, {S}, {S})")
        x, y = x.to(self.device, torch.float32), torch.as_tensor(y).to(self.device)
        if not (x.abs() <= 1.001).all():  # False for NaN, too
            raise ValueError("images must lie in [-1, 1] and be finite")
        whole = not y.is_floating_point() and y.dtype != torch.bool
        if y.shape != x.shape[:1] or not whole or ((y < 0) | (y >= K)).any():
            raise ValueError(f"labels must be integers, 0 to {K - 1}, of shape ({len(x)},)")
        return x.clamp(-1, 1), y.long()

    def save(self, path):
        """All but the classifier and a mask other than ImageMask. Raises OSError, ValueError."""
        for name in self.scorers.keys() - SCORERS.keys():
            raise ValueError(f"cannot save the scorer {name!r}: it is not in moodcat.SCORERS")
        nets = {"generator": self.generator, **self.scorers}
        save_checkpoint(path, dict(
            kind="detector", scorers=list(self.scorers),
            mask=self.mask.settings if type(self.mask) is ImageMask else None,
            masks=self.masks, rule=self.rule, calibration=self.calibration,
            nets={name: dict(settings=net.settings, weights=net.state_dict())
                  for name, net in nets.items() if hasattr(net, "settings")}))

    @classmethod
    def load(cls, path, device="cpu", classifier=None, mask=None):
        """What save() wrote; classifier: f(x) -> logits, for energy. Raises OSError, ValueError."""
        saved = load_checkpoint(path, "detector", device)
        try:
            settings = {name: net["settings"] for name, net in saved["nets"].items()}
            nets = {k: SCORERS[k](settings.get(k), classifier) for k in saved["scorers"]}
            generator = Generator(**settings["generator"]).to(device)
            mask = mask or ImageMask(**saved["mask"])
            detector = cls(generator, nets, mask, saved["masks"], saved["rule"])
            for name, net in saved["nets"].items():
                {"generator": generator, **nets}[name].load_state_dict(net["weights"])
            detector.calibration = saved["calibration"]
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"cannot load {path} with this classifier, mask: {error!r}") from error
        return detector

# --- Checkpoints: one dictionary, never half-written, never executed on loading, damage noticed --
FORMAT = "moodcat 2"
WRITTEN_BY = dict(generator="train_gen.py", classifier="train_scorer.py", scorer="train_scorer.py",
                  scorer_extra="train_scorer.py --extra FOLDER", detector="evaluate.py")

def save_checkpoint(path, content):
    """Write content, a dict with "kind", to a file beside `path`, then rename. Raises OSError."""
    path, buffer = Path(path), io.BytesIO()
    torch.save({**content, "format": FORMAT, "torch": str(torch.__version__)}, buffer)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}); an earlier one is whole") from error

def load_checkpoint(path, kind, device="cpu"):
    """What save_checkpoint wrote. Raises OSError (missing), ValueError (damaged, of other kind)."""
    if not Path(path).is_file():
        raise OSError(f"{path} does not exist: run {WRITTEN_BY.get(kind, 'its script')} first")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save's format, a checksum for each tensor
            if archive.testzip() is not None:
                raise ValueError("its checksum differs")
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes can fail anywhere in the unpickler
        raise ValueError(f"{path} is damaged or no checkpoint: delete it, train again") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of the project")
    if saved.get("kind") != kind:
        raise ValueError(f"{path} holds a {saved.get('kind')}, not a {kind}")
    return saved
