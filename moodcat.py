"""MoodCat: out-of-distribution detection by semantic mismatch under masking (Yang et al., 2022).

For a classifier C and an image x with prediction y = C(x): mask a random part of x, synthesise a
whole image x' from what is left and y, and measure how far x' is from x. An in-distribution image
should come back as itself, an OOD image as something of class y. This file is the method, the
detector first; train_gen.py and train_scorer.py train it, evaluate.py measures it.

    symbol     meaning                                     shape, range
    x          image                                       (B, C, H, W) float in [-1, 1]
    y          class label the synthesis is conditioned on (B,) int64 in [0, num_classes)
    M, x_m     mask; masked image, mid-grey (0) where M    (B, 1, H, W) bool, True = removed
    mu, logvar E(x_m): mean and log-variance of z          (B, 128)
    z          latent code, mu + exp(logvar / 2) * eps     (B, 128)
    x'         synthesis G(x_m, y) = D(z, y)               (B, C, H, W) float in [-1, 1]
    D^Unet     U-Net discriminator: image and pixel logits (B,) and (B, 1, H, W)
    C_b        conditional binary classifier, a scorer     (B,), higher = in-distribution
    p          p-value of a score by held-out ones         (B,), small = unlike in-distribution
    ch         channel multiplier, 32 in the paper
"""

import io
import math
import warnings
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

# --- The detector (Figure 2) ---------------------------------------------------------------------
class MoodCat:
    """The detector, for any classifier: x is rejected when its synthesis under y = C(x) differs.

    generator  the trained Generator
    scorers    {name: f}, f(x, x', y) -> (B,), higher = in-distribution
    mask       f(x, i) -> (x_m, M), the i-th mask of each image [ImageMask()]
    masks      a score is the mean over i = 0 to masks - 1 (the paper: 1)
    rule       what is_ood() goes by: a row of RULES, or one of the scorers alone

    Nets are set for inference, in place. Raises ValueError."""
    def __init__(self, generator, scorers, mask=None, masks=1, rule="fisher"):
        if not scorers or rule not in (*RULES, *scorers):
            raise ValueError("a detector needs scorers, and a rule: one of these alone, or a row of "
                             "moodcat.RULES")
        self.generator = for_inference(generator)
        self.scorers = dict(scorers)
        self.mask = mask or ImageMask()
        self.masks = masks
        self.rule = rule
        self.device = next(generator.parameters()).device
        self.calibration = None  # what calibrate() fixes
        for scorer in self.scorers.values():
            if isinstance(scorer, nn.Module):
                for_inference(scorer.to(self.device))
            sizes = {**generator.settings, **getattr(scorer, "settings", {})}
            if any(sizes[k] != generator.settings[k] for k in ("num_classes", "channels")):
                raise ValueError("a scorer has other classes or channels than the generator")

    def mismatch(self, x, y, i=0):
        """Figure 2, by the i-th mask: images x (B, C, S, S), labels y (B,) -> {scorer: (B,)}, x_m,
        x'."""
        x_m, _ = self.mask(x, i)                                              # mask
        x_fake, _, _ = self.generator(x_m, y)                                 # synthesise
        scores = {name: f(x, x_fake, y) for name, f in self.scorers.items()}  # score
        return scores, x_m, x_fake

    @torch.no_grad()
    def mean_mismatch(self, x, y):
        """The scores of mismatch(), their mean over the masks: {name: (B,)}. Raises ValueError."""
        # images and labels of the generator's sizes, or a line that says what is wrong
        K, _, S, C, *_ = self.generator.settings.values()
        if (not torch.is_tensor(x) or not x.is_floating_point() or x.shape[1:] != (C, S, S)
                or not len(x) or not (x.abs() <= 1.001).all()):  # not for NaN, either
            raise ValueError(f"the detector takes finite float images (B, {C}, {S}, {S}) that lie "
                             "in [-1, 1]; from uint8, x / 127.5 - 1")
        y = torch.as_tensor(y)
        if y.is_floating_point() or y.shape != x.shape[:1] or y.min() < 0 or y.max() >= K:
            raise ValueError(f"labels must be integers, 0 to {K - 1}, of shape (B,)")
        x = x.to(self.device, torch.float32).clamp(-1, 1)
        y = y.to(self.device, torch.long)

        chunks = []
        # on a CPU small chunks stay in the cache
        for rows in torch.arange(len(x)).split(512 if x.is_cuda else 32):
            scores = [self.mismatch(x[rows], y[rows], i)[0] for i in range(self.masks)]
            chunks.append({name: sum(s[name] / self.masks for s in scores)
                           for name in self.scorers})
        return concatenated(chunks)

    def score(self, x, y):
        """Scores of images x (B, C, S, S) float in [-1, 1] under labels y (B,), normally C(x):
        {name: (B,)}, higher = in-distribution; once calibrated, of RULES too. Raises ValueError."""
        scores = self.mean_mismatch(x, y)
        if self.calibration:
            scores.update(joint_scores(scores, self.calibration["held_out"]))
        return scores

    def calibrate(self, x, y, tpr=0.95, **notes):
        """Fix p-values and thresholds on held-out in-distribution images x (n, C, S, S), y = C(x);
        the notes are kept with them. Returns self; raises ValueError."""
        self.calibration = dict(fit_calibration(self.mean_mismatch(x, y), tpr), notes=notes)
        return self

    def is_ood(self, x, y):
        """True where rejected: x (B, C, S, S) in [-1, 1], y (B,) = C(x) -> bool (B,)."""
        if not self.calibration:
            raise ValueError("calibrate the detector before asking for verdicts")
        return self.rejects(self.score(x, y))

    def rejects(self, scores):
        """What score() returned -> bool (B,); a score that is not finite rejects."""
        return ~(scores[self.rule] >= self.calibration["threshold"][self.rule])

    def save(self, path):
        """All but the classifier and a mask other than ImageMask. Raises OSError, ValueError."""
        nets = {"generator": self.generator}
        for name, scorer in self.scorers.items():
            if name not in SCORERS:
                raise ValueError(f"cannot save the scorer {name!r}: it is not in moodcat.SCORERS")
            if hasattr(scorer, "settings"):
                nets[name] = scorer
        save_checkpoint(path, dict(
            kind="detector", scorers=list(self.scorers), mask=described(self.mask),
            masks=self.masks, rule=self.rule, calibration=self.calibration,
            settings={name: net.settings for name, net in nets.items()},
            weights={name: net.state_dict() for name, net in nets.items()}))

    @classmethod
    def load(cls, path, device="cpu", classifier=None, mask=None):
        """What save() wrote; classifier: f(x) -> logits, for energy; mask: the one it was saved
        with, where that is not ImageMask. Raises OSError, ValueError."""
        saved = load_checkpoint(path, "detector", device)
        try:
            name, options = saved["mask"]
            if name == "ImageMask":
                mask = mask or ImageMask(**options)
            if described(mask) != (name, options):
                raise ValueError(f"it was saved with the mask {name}: name that one, mask=...")
            settings = saved["settings"]
            nets = {name: SCORERS[name](settings.get(name), classifier)
                    for name in saved["scorers"]}
            generator = Generator(**settings["generator"]).to(device)
            detector = cls(generator, nets, mask, saved["masks"], saved["rule"])
            nets["generator"] = generator
            for name, weights in saved["weights"].items():
                nets[name].load_state_dict(weights)
            detector.calibration = saved["calibration"]
        except Exception as error:  # an odd file fails in many ways
            raise ValueError(f"cannot load {path} with this code, classifier, mask: {error!r}"
                             ) from error
        return detector

# --- Masking (section 3.3, Table 5) --------------------------------------------------------------
def random_mask(x, ratio=(0.1, 0.3), generator=None, u=None, style="rectangle"):
    """Remove a random part of each image x (B, C, H, W) (section 3.3).

    ratio      share of the area to remove, a range or one number
    generator  a CPU torch.Generator; or u (B, 3): its numbers in [0, 1), if they are given
    style      a row of MASKS

    Returns x_m (B, C, H, W), 0 where removed, and M (B, 1, H, W), True = removed; or ValueError."""
    low, high = np.broadcast_to(ratio, 2).tolist()  # one number is both
    if not 0 <= low <= high <= 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1], the smaller number first")
    if style not in MASKS:
        raise ValueError(f"no mask {style!r} in moodcat.MASKS: put it there for every script")
    if u is None:
        u = torch.rand(len(x), 3, generator=generator)
    mask = MASKS[style](u, *x.shape[2:], low, high).to(x.device)
    return x.masked_fill(mask, 0.0), mask

def random_rectangles(u, H, W, low, high):
    """A rectangle an image of H x W, as in Table 5: u (B, 3) says which, how far down and how far
    right -> M (B, 1, H, W)."""
    which, down, right = u.split(1, 1)                                        # (B, 1) each
    sides = rectangle_sides(H, W, low, high)                                  # (S, 2)
    h, w = sides[(which * len(sides)).long()].unbind(2)                       # (B, 1) each
    in_rows = within(torch.arange(H), (down * (H - h + 1)).long(), h)         # (B, H)
    in_cols = within(torch.arange(W), (right * (W - w + 1)).long(), w)        # (B, W)
    return in_rows[:, None, :, None] & in_cols[:, None, None, :]

def within(places, start, length):
    """places (n,), start and length (B, 1) -> (B, n): which places lie in the stretch."""
    return (places >= start) & (places < start + length)

@lru_cache
def rectangle_sides(H, W, low, high):
    """Every (h, w) with an aspect of 0.4 to 2.5 (authors: 0.5 to 2.5) and an area inside the ratio,
    or else nearest to it: (S, 2). Equal chances for each make area and log-aspect uniform, since
    dh dw = dA dr / 2r for the area A and the aspect r."""
    if high == 0:
        return torch.zeros(1, 2, dtype=torch.long)
    sides = torch.cartesian_prod(torch.arange(1, H + 1), torch.arange(1, W + 1))
    h, w = sides.double().T
    share = h * w / (H * W)
    off = (share - share.clamp(low, high)).abs()
    off[(h / w < 0.4) | (h / w > 2.5)] = torch.inf
    return sides[off <= off.min() + 1e-9]

# style: f(u, H, W, low, high) -> M; a fork's mask is a function here, for training and test
MASKS = {"rectangle": random_rectangles}

class ImageMask:
    """The detector's mask f(x, i) -> (x_m, M): the i-th random_mask of an image, which depends on
    its pixels and the seed alone, so that its score does not depend on batch, order or process."""
    def __init__(self, ratio=(0.1, 0.3), seed=0, style="rectangle"):
        self.settings = dict(ratio=ratio, seed=seed, style=style)

    def __call__(self, x, i=0):
        ratio, seed, style = self.settings.values()
        pixels = ((x + 1) * 127.5).round().byte().cpu().numpy()  # 8 bits: equal on every device
        u = []
        for image in pixels:
            crc = zlib.crc32(image.tobytes(), 1000 * seed + i)
            u.append(torch.rand(3, generator=torch.Generator().manual_seed(crc)))
        return random_mask(x, ratio, u=torch.stack(u), style=style)

def concatenated(chunks):
    """Dictionaries of tensors -> one dictionary, each entry with those of all."""
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

def described(mask):
    """How a detector's file names its mask: (class or function, settings)."""
    return getattr(mask, "__name__", type(mask).__name__), getattr(mask, "settings", None)

# --- Encoder (section 3.4, appendix A.2) ---------------------------------------------------------
class Encoder(nn.Module):
    """E: x_m (B, channels, S, S) -> mu, logvar (B, z_dim), the Gaussian of z; the paper's Sigma is
    exp(logvar / 2). Both heads are trained; the authors' code left them at their start."""
    def __init__(self, ch=32, image_size=32, channels=3, z_dim=128):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, ch, 4, 2, 1, bias=False),                     # S/2
            nn.LeakyReLU(0.2),
            nn.Conv2d(ch, 2 * ch, 4, 2, 1, bias=False),                       # S/4
            nn.BatchNorm2d(2 * ch),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * ch, 4 * ch, 4, 2, 1, bias=False),                   # S/8
            nn.BatchNorm2d(4 * ch),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * ch, 4 * ch, image_size // 8, bias=False),           # 1
            nn.LeakyReLU(0.2),
            nn.Flatten())
        self.mu = nn.Linear(4 * ch, z_dim)
        self.logvar = nn.Linear(4 * ch, z_dim)

    def forward(self, x_m):
        h = self.features(x_m)                                                # (B, 4ch)
        return self.mu(h), self.logvar(h)                                     # 2 x (B, z_dim)

def kl_divergence(mu, logvar):
    """D_KL[N(mu, Sigma) || N(0, 1)] in nats, summed over z (Eq. 1): 2 x (B, z_dim) -> (B,)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)

# --- Decoder (section 3.4: BigGAN blocks with class-conditional batch norm) ----------------------
def spectral(layer):
    """BigGAN's recipe for every learned layer: orthogonal start, spectral norm."""
    nn.init.orthogonal_(layer.weight)
    return parametrizations.spectral_norm(layer)

def spectral_conv(cin, cout, kernel):
    """A convolution that keeps the side."""
    return spectral(nn.Conv2d(cin, cout, kernel, padding=kernel // 2))

class ConditionalBatchNorm(nn.Module):
    """x (B, C, H, W), class embedding e (B, E) -> (1 + gain(e)) * norm(x) + bias(e), [5]."""
    def __init__(self, channels, embed_dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = spectral(nn.Linear(embed_dim, channels, bias=False))
        self.bias = spectral(nn.Linear(embed_dim, channels, bias=False))

    def forward(self, x, e):
        gain = 1 + self.gain(e)[..., None, None]                              # (B, C, 1, 1)
        bias = self.bias(e)[..., None, None]                                  # (B, C, 1, 1)
        return gain * self.norm(x) + bias

class UpBlock(nn.Module):
    """Residual block that doubles the side: (B, cin, S, S) -> (B, cout, 2S, 2S). With embed_dim,
    class-conditional batch norm before each activation (decoder); without, none (D^Unet)."""
    def __init__(self, cin, cout, embed_dim=None):
        super().__init__()
        self.norm1 = ConditionalBatchNorm(cin, embed_dim) if embed_dim else no_norm
        self.norm2 = ConditionalBatchNorm(cout, embed_dim) if embed_dim else no_norm
        self.conv1 = spectral_conv(cin, cout, 3)
        self.conv2 = spectral_conv(cout, cout, 3)
        self.skip = spectral_conv(cin, cout, 1)

    def forward(self, x, e=None):
        h = F.relu(self.norm1(x, e))                                          # (B, cin, S, S)
        h = self.conv1(F.interpolate(h, scale_factor=2))                      # (B, cout, 2S, 2S)
        h = self.conv2(F.relu(self.norm2(h, e)))
        # a 1x1 convolution commutes with nearest-neighbour upsampling: convolve the small side
        return h + F.interpolate(self.skip(x), scale_factor=2)

def no_norm(x, e):
    """In place of a batch norm: x as it is."""
    return x

class Decoder(nn.Module):
    """D: z (B, z_dim), y (B,) -> x' (B, channels, S, S) in [-1, 1]. The label enters through the
    batch norms alone, so z gives the template and y the class (section 3.4)."""
    def __init__(self, num_classes, ch=32, image_size=32, channels=3, z_dim=128):
        super().__init__()
        self.side = image_size // 8
        self.embed = nn.Embedding(num_classes, 128)
        nn.init.orthogonal_(self.embed.weight)
        self.first = spectral(nn.Linear(z_dim, 16 * ch * self.side**2))
        self.blocks = nn.ModuleList([
            UpBlock(16 * ch, 8 * ch, 128),
            UpBlock(8 * ch, 4 * ch, 128),
            UpBlock(4 * ch, ch, 128)])
        self.last = nn.Sequential(
            nn.BatchNorm2d(ch),
            nn.ReLU(),
            spectral_conv(ch, channels, 3),
            nn.Tanh())

    def forward(self, z, y):
        e = self.embed(y)                                                     # (B, 128)
        h = self.first(z).unflatten(1, (-1, self.side, self.side))            # (B, 16ch, S/8, S/8)
        for block in self.blocks:
            h = block(h, e)                                                   # 8ch, 4ch, ch
        return self.last(h)                                                   # (B, channels, S, S)

class Generator(nn.Module):
    """G = D(E(.), y), the whole synthesis (section 3.4): x_m (B, channels, S, S) in [-1, 1], y (B,)
    -> x' (B, channels, S, S), mu, logvar (B, z_dim). train() samples z; eval() takes mu, which is
    repeatable. conditional=False (Table 6): one embedding for all classes. Raises ValueError."""
    def __init__(self, num_classes, ch=32, image_size=32, channels=3, z_dim=128, conditional=True):
        super().__init__()
        self.settings = dict(num_classes=num_classes, ch=ch, image_size=image_size,
                             channels=channels, z_dim=z_dim, conditional=conditional)
        require_possible(**self.settings)
        self.encoder = Encoder(ch, image_size, channels, z_dim)
        self.decoder = Decoder(num_classes if conditional else 1, ch, image_size, channels, z_dim)

    def forward(self, x_m, y):
        mu, logvar = self.encoder(x_m)                                        # E
        z = mu
        if self.training:
            z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        if not self.settings["conditional"]:
            y = torch.zeros_like(y)
        x_fake = self.decoder(z, y)                                           # D
        return x_fake, mu, logvar

# --- Discriminator (section 3.4, appendix A; U-Net GAN = reference [40]) -------------------------
class DownBlock(nn.Module):
    """Block of D^Unet and C_b: (B, cin, S, S) -> (B, cout, S/2, S/2); with down=False, for cin =
    cout, the sides stay."""
    def __init__(self, cin, cout, first=False, down=True):
        super().__init__()
        self.first = first
        self.down = down
        self.conv1 = spectral_conv(cin, cout, 3)
        self.conv2 = spectral_conv(cout, cout, 3)
        self.skip = spectral_conv(cin, cout, 1) if down else nn.Identity()

    def forward(self, x):
        h = x if self.first else F.relu(x)
        h = self.conv2(F.relu(self.conv1(h)))
        if self.down:
            h = F.avg_pool2d(h, 2)
            x = F.avg_pool2d(x, 2)  # before the 1x1 skip, with which pooling commutes
        return h + self.skip(x)

class Projection(nn.Module):
    """Conditional logit w . h + b + embed(y) . h (Miyato and Koyama [30]): h (B, width) or
    (B, width, H, W), y (B,) -> (B,) or (B, H, W)."""
    def __init__(self, width, num_classes):
        super().__init__()
        self.linear = spectral(nn.Linear(width, 1))
        self.embed = spectral(nn.Embedding(num_classes, width))

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
        self.up1 = UpBlock(16 * ch, 4 * ch)
        self.up2 = UpBlock(8 * ch, ch)
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
        pixel_logits = self.pixel_head(F.relu(u), y)[:, None]                 # (B, 1, S, S)
        return logit, pixel_logits

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
    g = torch.exp(-torch.arange(-5, 6, dtype=x.dtype, device=x.device).square() / 4.5)
    C = x.shape[1]
    window = (torch.outer(g, g) / g.sum()**2).expand(C, 1, 11, 11)            # (C, 1, 11, 11)
    blur = lambda t: F.conv2d(t, window, groups=C)
    x = (x + 1) / 2
    y = (y + 1) / 2
    mx = blur(x)
    my = blur(y)
    vx = blur(x * x) - mx * mx
    vy = blur(y * y) - my * my
    cov = blur(x * y) - mx * my
    value = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4)
             / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4)))
    return value.mean((1, 2, 3))

# --- Scorers (section 3.5): f(x, x', y) -> (B,), higher = in-distribution ------------------------
class BinaryScorer(nn.Module):
    """C_b (Figure 3), BigGAN's small discriminator: does x', made for y, show what x shows? x, x'
    (B, channels, S, S), y (B,) -> (B,), higher = in-distribution (the authors: lower)."""
    def __init__(self, num_classes, ch=32, channels=3):
        super().__init__()
        self.settings = dict(num_classes=num_classes, ch=ch, channels=channels)
        require_possible(**self.settings)
        self.blocks = nn.Sequential(
            DownBlock(2 * channels, 2 * ch, first=True),
            DownBlock(2 * ch, 2 * ch),
            DownBlock(2 * ch, 2 * ch, down=False),
            DownBlock(2 * ch, 2 * ch, down=False))
        self.head = Projection(2 * ch, num_classes)

    def forward(self, x, x_fake, y):
        h = self.blocks(torch.cat([x, x_fake], 1))                            # (B, 2ch, S/4, S/4)
        return self.head(F.relu(h).sum((2, 3)), y)                            # (B,)

class Trained(NamedTuple):
    """A row of SCORERS for a net that is trained: its class, its checkpoint RUN/<checkpoint>.pt and
    the command that writes it."""
    net: type
    checkpoint: str
    command: str

    def __call__(self, settings, classifier):
        return self.net(**settings)

class Negative(nn.Module):
    """A distance of x and x' -> (B,) as a scorer."""
    def __init__(self, distance):
        super().__init__()
        self.distance = distance

    def forward(self, x, x_fake, y):
        return -self.distance(x, x_fake)

def similarity(x, x_fake, y):
    """SSIM as a scorer."""
    return ssim(x, x_fake)

def energy_of(classifier):
    """The classifier's energy (EBO), which the paper does not have as a scorer: log sum exp of its
    logits; neither x' nor y plays a part."""
    if classifier is None:
        raise ValueError("the scorer energy needs the classifier: give it, too")
    return lambda x, x_fake, y: classifier(x).float().logsumexp(1)

# name: f(settings of a trained net, classifier) -> scorer; for --scorers, MoodCat.save and .load
SCORERS = {
    "cb": Trained(BinaryScorer, "scorer", "train_scorer.py"),
    "cb_extra": Trained(BinaryScorer, "scorer_extra", "train_scorer.py --extra FOLDER"),
    "ssim": lambda settings, classifier: similarity,
    "lpips": lambda settings, classifier: Negative(LPIPS("vgg")),
    "lpips-squeeze": lambda settings, classifier: Negative(LPIPS("squeeze")),
    "dists": lambda settings, classifier: Negative(DISTS()),
    "energy": lambda settings, classifier: energy_of(classifier)}

# --- From scores to one verdict (section 3.5): p-values, joined ----------------------------------
# any scorer that flags rejects, as in the paper; and the sum of log p (Fisher's method)
RULES = {"min-p": lambda log_p: log_p.amin(0), "fisher": lambda log_p: log_p.sum(0)}

def log_p_values(scores, held_out):
    """log p of scores (B,) by held-out in-distribution scores (n,): (B,) float64 on the CPU. p is
    how many of those are no higher, over n + 1, linear between them; below the least it falls off
    exponentially, by e for each standard deviation; NaN for a score that is not finite."""
    s = scores.cpu().double()
    h = held_out.cpu().double().sort().values
    p = np.interp(s, h, np.arange(1, len(h) + 1) / (len(h) + 1))
    below = (h[0] - s).clamp(min=0) / h.std().clamp(min=1e-9)
    return torch.from_numpy(p).log() - below + 0 * s  # 0 * s: NaN where s is not finite

def joint_scores(scores, held_out):
    """Scores {name: (B,)} of the scorers in held_out {name: (n,)} -> {rule: (B,)} of RULES, on the
    CPU."""
    log_p = torch.stack([log_p_values(scores[name], held_out[name]) for name in held_out])
    return {name: rule(log_p).float() for name, rule in RULES.items()}

def fit_calibration(scores, tpr=0.95):
    """From scores {name: (n,)} of held-out in-distribution images under y = C(x): the even images'
    for joint_scores(), and the threshold of each rule, and of each scorer alone, at which the odd ones
    promise that a share of at least `tpr` of fresh images is accepted. Raises ValueError."""
    if not all(values.isfinite().all() for values in scores.values()):
        raise ValueError("a held-out image has a score that is not finite: check the scorers")
    even = {name: values[::2].clone() for name, values in scores.items()}
    odd = {name: values[1::2] for name, values in scores.items()}
    n = len(next(iter(odd.values())))
    # accepting down to the k-th largest of n accepts a fresh image with probability k / (n + 1)
    k = math.ceil(tpr * (n + 1) - 1e-9)
    if not 0 < k <= n:
        raise ValueError(f"{n} held-out images (half of them) cannot fix a TPR of {tpr}: give more")
    threshold = {rule: values.topk(k).values[-1].item()
                 for rule, values in (odd | joint_scores(odd, even)).items()}
    return dict(held_out=even, threshold=threshold, tpr=tpr)

# --- Below: what serves the detector. The method is above. ---------------------------------------
def for_inference(net):
    """net, in place: eval(), no gradients, spectral norms folded into the weights."""
    net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    for module in list(net.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return net

def require_possible(num_classes, ch, channels, image_size=16, z_dim=128, conditional=True):
    """ValueError for a net of settings that no net has; nothing is built yet."""
    if not (1 <= num_classes <= 100_000 and 1 <= ch <= 256 and channels in (1, 3)
            and image_size in range(16, 513, 8) and 1 <= z_dim <= 4096):
        raise ValueError("no net has these sizes: it takes up to 100,000 classes, ch up to 256, 1 "
                         "or 3 channels, an image size of 16 to 512, a multiple of 8")

# --- LPIPS and DISTS (section 3.5), metrics of others --------------------------------------------
WEIGHT_FILES = {"vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth",
                "dists": "dists_alpha_beta.pt"}

def pretrained(name, load):
    """load(), which may download WEIGHT_FILES[name]; a failure says in a line what to do."""
    try:
        with warnings.catch_warnings():  # lpips calls torchvision by its old keyword
            warnings.simplefilter("ignore", UserWarning)
            return load()
    except Exception as error:  # downloads and damaged files fail in many ways
        raise OSError(f"no usable {WEIGHT_FILES[name]} ({error!s:.200}): put it into "
                      f"{torch.hub.get_dir()}/checkpoints, or use --scorers cb ssim energy"
                      ) from error

def for_perception(x):
    """Grey to three channels, sides under 32 to 32: the pretrained nets know nothing smaller."""
    if min(x.shape[2:]) < 32:
        x = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    return x.expand(-1, 3, -1, -1)

class LPIPS(nn.Module):
    """Perceptual distance of Zhang et al. [53], by the lpips package; net "vgg" (that of Table 13)
    or "squeeze". x, x' (B, 1 or 3, H, W) in [-1, 1] -> (B,), 0 = equal. Raises OSError."""
    def __init__(self, net="vgg"):
        super().__init__()
        import lpips  # takes a second; detectors without it start faster
        self.metric = pretrained(net, lambda: lpips.LPIPS(net=net, verbose=False))

    def forward(self, x, x_fake):
        return self.metric(for_perception(x), for_perception(x_fake)).flatten()

class DISTS(nn.Module):
    """Structure and texture distance of Ding et al. [8], on torchvision's VGG16: x, x' (B, 1 or 3,
    H, W) in [-1, 1] -> (B,), 0 = equal. In the image and five stages, channel means compare texture
    (S1) and covariances structure (S2), mixed by learned weights alpha, beta. Raises OSError."""
    def __init__(self):
        super().__init__()
        from torchvision import models, transforms
        vgg = pretrained("vgg", lambda: models.vgg16(weights="IMAGENET1K_V1")).features
        # cut at the max pools: L2 pooling takes their place
        self.stages = nn.ModuleList([vgg[0:4], vgg[5:9], vgg[10:16], vgg[17:23], vgg[24:30]])
        learned = pretrained("dists", lambda: torch.hub.load_state_dict_from_url(
            "https://raw.githubusercontent.com/dingkeyan93/DISTS/master/DISTS_pytorch/weights.pt",
            map_location="cpu", file_name=WEIGHT_FILES["dists"], weights_only=True))
        weights = torch.cat([learned["alpha"], learned["beta"]]).flatten()    # (2950,)
        self.register_buffer("weights", weights / weights.sum())
        self.normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def features(self, x):
        """x and the maps after each stage, (B, c, h w) each."""
        x = (for_perception(x) + 1) / 2  # DISTS takes [0, 1]
        found = [x.flatten(2)]
        h = self.normalise(x)
        for stage in self.stages:
            h = stage(h)
            found.append(h.flatten(2))
            h = l2_pool(h)
        return found

    def forward(self, x, x_fake):
        s1 = []
        s2 = []
        for a, b in zip(self.features(x), self.features(x_fake)):
            mean_a = a.mean(2)                                                # (B, c)
            mean_b = b.mean(2)
            variances = a.var(2, correction=0) + b.var(2, correction=0)
            cov = (a * b).mean(2) - mean_a * mean_b
            s1.append((2 * mean_a * mean_b + 1e-6) / (mean_a**2 + mean_b**2 + 1e-6))
            s2.append((2 * cov + 1e-6) / (variances + 1e-6))
        return 1 - torch.cat(s1 + s2, 1) @ self.weights

def l2_pool(h):
    """(B, c, H, W) -> (B, c, H/2, W/2)."""
    g = torch.tensor([0.25, 0.5, 0.25], device=h.device)
    window = torch.outer(g, g).expand(h.shape[1], 1, 3, 3)
    h = F.conv2d(h.square(), window, stride=2, padding=1, groups=h.shape[1])
    return (h + 1e-12).sqrt()

# --- Checkpoints: one dictionary, never half-written, never executed on loading, damage noticed --
FORMAT = "moodcat 3"

def save_checkpoint(path, content):
    """Write content, a dict with "kind", to a file. Raises OSError."""
    buffer = io.BytesIO()
    torch.save({**content, "format": FORMAT}, buffer)
    write_whole(path, buffer.getvalue())

def write_whole(path, content):
    """Write bytes to a file beside `path`, then rename: never half a file. Raises OSError."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}); an earlier one is whole") from error

def load_checkpoint(path, kind, device="cpu"):
    """What save_checkpoint wrote. Raises OSError (missing), ValueError (damaged, of other kind)."""
    if not Path(path).is_file():
        writers = {"generator": "run train_gen.py", "detector": "run evaluate.py",
                   "classifier": "run train_scorer.py, or name your own with --classifier"}
        raise OSError(f"{path} does not exist: {writers.get(kind, 'run train_scorer.py')} first")
    try:
        if zipfile.ZipFile(path).testzip():  # torch.save's format has a checksum for each tensor
            raise ValueError
        saved = torch.load(path, map_location=device, weights_only=True)
        written = saved["kind"], saved["format"]
    except Exception as error:  # damaged bytes can fail anywhere in the unpickler
        raise ValueError(f"{path} is damaged or no checkpoint: delete it, train again") from error
    if written != (kind, FORMAT):
        raise ValueError(f"{path} is {written}, not a {kind} of this version: train it again, or "
                         "use the version of the project that wrote it")
    return saved

def load_weights(net, weights, path):
    """Weights into a net, or a ValueError in a line where they do not fit (a fork's net)."""
    try:
        net.load_state_dict(weights)
    except Exception as error:  # another net's weights fail in many ways
        raise ValueError(f"{path} does not fit this code's net: train it again, or use the code "
                         f"that wrote it ({error!s:.200})") from error
