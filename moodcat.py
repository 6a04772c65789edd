"""MoodCat: out-of-distribution detection by semantic mismatch under masking (Yang et al., ECCV 2022).

For a classifier C and an image x with prediction y = C(x): mask a random part of x, synthesise a
whole image x' from what is left and y, and measure how far x' is from x. An in-distribution image
comes back as itself; an OOD image comes back as something of class y. This file is the method, in
the order of the paper's Figure 2: mask, encoder, decoder, discriminator, losses, scorer, image
quality, detector. Training is in train_gen.py and train_scorer.py, numbers are in evaluate.py.

    symbol     meaning                                     shape, range
    x          image                                       (B, C, H, W) float in [-1, 1]
    y          class label the synthesis is conditioned on (B,) int64 in [0, num_classes)
    M, x_m     mask; masked image, mid-grey (0) where M    (B, 1, H, W) bool, True = removed
    mu, logvar E(x_m): mean and log-variance of z          (B, 128)
    z          latent code, mu + exp(logvar / 2) * eps     (B, 128)
    x'         synthesis G(x_m, y) = D(z, y)               (B, C, H, W) float in [-1, 1]
    D^Unet     U-Net discriminator: image and pixel logits (B,) and (B, 1, H, W)
    C_b        conditional binary classifier, the scorer   (B,), higher = in-distribution
    ch         channel multiplier, 32 in the paper
"""

import hashlib
import io
import math
import os
import pickle
import tempfile
import warnings
import zlib
from itertools import product
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

# ---------------------------------------------------------------------------------------------
# Masking (section 3.3, Tables 5 and 11, Figure 4)

MASK_STYLES = ("random", "none", "fixed", "patch", "shuffle")
GRID = 4  # "patch" and "shuffle" cut the image into GRID x GRID squares
DRAWS = 1 + GRID**2  # random numbers an image's mask may need


def random_mask(x, ratio=(0.1, 0.3), style="random", generator=None):
    """Remove a random part of each image (section 3.3): (x_m, mask).

    x: (B, C, H, W); ratio: share of the area to remove, a range or one number; generator: a CPU
    torch.Generator (None: the global one). Returns x_m (B, C, H, W), mid-grey (0) where removed,
    and mask (B, 1, H, W) bool, True = removed. Styles (Table 11): "random", a rectangle of its own
    for each image; "none"; "fixed", a centred square (a range: its middle); "patch", that share of a
    4x4 grid; "shuffle", the grid's squares permuted, nothing removed. Raises ValueError.
    """
    draws = torch.rand(len(x), DRAWS, generator=generator)  # all the randomness there is
    return _mask_by(draws, x, ratio, style)


def _mask_by(draws, x, ratio, style):
    """random_mask with its random numbers given: draws (B, DRAWS) uniform in [0, 1), on the CPU."""
    low, high = ratio if isinstance(ratio, (tuple, list)) else (ratio, ratio)
    if style not in MASK_STYLES:
        raise ValueError(f"mask style {style!r} is none of {', '.join(MASK_STYLES)}")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1], the smaller number first")
    B, _, H, W = x.shape
    if style in ("patch", "shuffle") and (H % GRID or W % GRID):
        raise ValueError(f"mask style {style!r} needs sides that are multiples of {GRID}")
    if style == "random" and high > 0:
        sides = torch.tensor(_rectangles(H, W, low, high))  # (S, 2), a uniform draw among them
        h, w = sides[(draws[:, 0] * len(sides)).long()].T  # (B,), (B,)
        top = (draws[:, 1] * (H - h + 1)).long()[:, None]
        left = (draws[:, 2] * (W - w + 1)).long()[:, None]
        rows, cols = torch.arange(H), torch.arange(W)
        in_rows = (rows >= top) & (rows < top + h[:, None])  # (B, H)
        in_cols = (cols >= left) & (cols < left + w[:, None])  # (B, W)
        mask = (in_rows[:, :, None] & in_cols[:, None, :])[:, None]
    elif style == "fixed":
        side_h, side_w = (round(n * ((low + high) / 2) ** 0.5) for n in (H, W))
        top, left = (H - side_h) // 2, (W - side_w) // 2
        mask = torch.zeros(B, 1, H, W, dtype=torch.bool)
        mask[:, :, top:top + side_h, left:left + side_w] = True
    elif style == "patch":
        # a number of squares inside the range; where none is (one number), the nearest
        counts = [k for k in range(GRID**2 + 1) if low <= k / GRID**2 <= high]
        counts = torch.tensor(counts or [round((low + high) / 2 * GRID**2)])
        count = counts[(draws[:, 0] * len(counts)).long()][:, None]
        order = draws[:, 1:].argsort(1).argsort(1)  # (B, 16), a permutation
        mask = (order < count).view(B, 1, GRID, GRID)
        mask = mask.repeat_interleave(H // GRID, 2).repeat_interleave(W // GRID, 3)
    else:  # "none" and "shuffle", or nothing to remove
        mask = torch.zeros(B, 1, H, W, dtype=torch.bool)
    if style == "shuffle":
        squares = F.unfold(x, (H // GRID, W // GRID), stride=(H // GRID, W // GRID))
        order = draws[:, 1:].argsort(1).to(x.device)[:, None].expand_as(squares)
        x = F.fold(squares.gather(2, order), (H, W), (H // GRID, W // GRID),
                   stride=(H // GRID, W // GRID))
    mask = mask.to(x.device)
    return x.masked_fill(mask, 0.0), mask


def _rectangles(H, W, low, high):
    """Every (h, w) whose area lies inside the ratio and whose aspect is within 0.4 to 2.5 (the
    authors' code takes 0.5 to 2.5). Equal chances for each make area uniform and aspect
    log-uniform. For one number, or a range too narrow to hold a rectangle: those within 3% of
    its middle, else the nearest."""
    middle = (low + high) / 2 * H * W
    sides = [(h, w) for h, w in product(range(1, H + 1), range(1, W + 1)) if 0.4 <= h / w <= 2.5]
    return (([s for s in sides if low * H * W <= s[0] * s[1] <= high * H * W] if low < high else [])
            or [s for s in sides if abs(s[0] * s[1] - middle) <= 0.03 * middle]
            or [min(sides, key=lambda s: abs(s[0] * s[1] - middle))])


# ---------------------------------------------------------------------------------------------
# Encoder (section 3.4, appendix A.2)

class Encoder(nn.Module):
    """E: a masked image to the Gaussian of its latent code; four convolutions, two linear heads.

    (B, channels, S, S) in [-1, 1] -> mu (B, z_dim), logvar (B, z_dim), S = image_size. The paper's
    Sigma is exp(logvar / 2). Both heads are trained; the authors' code left them at their start.
    """

    def __init__(self, ch=32, image_size=32, channels=3, z_dim=128):
        super().__init__()
        conv = lambda cin, cout, *how: nn.Conv2d(cin, cout, *how, bias=False)
        self.features = nn.Sequential(
            conv(channels, ch, 4, 2, 1), nn.LeakyReLU(0.2),                              # S / 2
            conv(ch, 2 * ch, 4, 2, 1), nn.BatchNorm2d(2 * ch), nn.LeakyReLU(0.2),        # S / 4
            conv(2 * ch, 4 * ch, 4, 2, 1), nn.BatchNorm2d(4 * ch), nn.LeakyReLU(0.2),    # S / 8
            conv(4 * ch, 4 * ch, image_size // 8), nn.LeakyReLU(0.2), nn.Flatten())      # 1
        self.mu = nn.Linear(4 * ch, z_dim)
        self.logvar = nn.Linear(4 * ch, z_dim)

    def forward(self, x_m):
        h = self.features(x_m)                                                   # (B, 4ch)
        return self.mu(h), self.logvar(h)                                        # 2 x (B, z_dim)


def kl_divergence(mu, logvar):
    """D_KL[N(mu, Sigma) || N(0, 1)] in nats, summed over z (Eq. 1): 2 x (B, z_dim) -> (B,)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


# ---------------------------------------------------------------------------------------------
# Decoder (section 3.4: BigGAN blocks with class-conditional batch norm; BigGAN = reference [2])

def _sn(layer):
    """BigGAN's recipe for every learned layer: orthogonal start, spectral norm."""
    nn.init.orthogonal_(layer.weight)
    return spectral_norm(layer)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in the class embedding (section 3.4, [5]):
    x (B, channels, H, W), e (B, embed_dim) -> (1 + gain(e)) * norm(x) + bias(e)."""

    def __init__(self, channels, embed_dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = _sn(nn.Linear(embed_dim, channels, bias=False))
        self.bias = _sn(nn.Linear(embed_dim, channels, bias=False))

    def forward(self, x, e):
        gain, bias = 1 + self.gain(e), self.bias(e)                              # (B, channels)
        if self.norm.training:
            return gain[:, :, None, None] * self.norm(x) + bias[:, :, None, None]
        # the running statistics are constants: one multiply-add
        gain = gain * (self.norm.running_var + self.norm.eps).rsqrt()
        bias = bias - gain * self.norm.running_mean
        return torch.addcmul(bias[:, :, None, None], gain[:, :, None, None], x)


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
        h = F.relu(self.norm1(x, e) if self.norm1 else x)                        # (B, cin, S, S)
        h = self.conv1(F.interpolate(h, scale_factor=2))                         # (B, cout, 2S, 2S)
        h = self.conv2(F.relu(self.norm2(h, e) if self.norm2 else h))
        # a 1x1 convolution commutes with nearest-neighbour upsampling: convolve the small side
        return h + F.interpolate(self.skip(x), scale_factor=2)


class Decoder(nn.Module):
    """D: latent code and label to an image.

    z (B, z_dim), y (B,) -> x' (B, channels, S, S) in [-1, 1], S = image_size. The label enters
    through the batch norms alone, so z gives the template and y the class (section 3.4).
    """

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
        e = self.embed(y)                                                        # (B, 128)
        h = self.first(z).unflatten(1, (-1, self.side, self.side))               # (B, 16ch, S/8, S/8)
        for block in self.blocks:
            h = block(h, e)                                                      # 8ch, 4ch, ch
        return self.last(h)                                                      # (B, channels, S, S)


class Generator(nn.Module):
    """G = D(E(.), y), the whole synthesis (section 3.4).

    x_m (B, channels, S, S) in [-1, 1], y (B,) -> x' (B, channels, S, S), mu, logvar (B, z_dim).
    In train() z is sampled; in eval() z = mu, so that a synthesis is repeatable. S is a multiple of
    8, at least 16; the paper has 32. Raises ValueError for any other size. With conditional=False
    (Table 6) y is ignored: one embedding serves every class.
    """

    def __init__(self, num_classes, ch=32, image_size=32, channels=3, z_dim=128, conditional=True):
        super().__init__()
        self.settings = dict(num_classes=num_classes, ch=ch, image_size=image_size,
                             channels=channels, z_dim=z_dim, conditional=conditional)
        if image_size < 16 or image_size % 8:
            raise ValueError(f"image size {image_size} must be a multiple of 8, at least 16")
        if channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, not {channels}")
        self.encoder = Encoder(ch, image_size, channels, z_dim)
        self.decoder = Decoder(num_classes if conditional else 1, ch, image_size, channels, z_dim)

    def forward(self, x_m, y):
        mu, logvar = self.encoder(x_m)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu) if self.training else mu
        return self.decoder(z, y if self.settings["conditional"] else y * 0), mu, logvar


# ---------------------------------------------------------------------------------------------
# Discriminator (section 3.4, appendix A; U-Net GAN = reference [40])

class DownBlock(nn.Module):
    """Residual block of the discriminator and the scorer: (B, cin, S, S) -> (B, cout, S/2, S/2),
    or the same side with down=False. The first block of a net takes no activation before it."""

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
    """Conditional logit of features h (B, width): w . h + b + embed(y) . h (Miyato and Koyama [30])."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.linear = _sn(nn.Linear(width, 1))
        self.embed = _sn(nn.Embedding(num_classes, width))

    def forward(self, h, y):
        """h (B, width) or (B, width, H, W), y (B,) -> (B,) or (B, 1, H, W)."""
        weight = self.linear.weight + self.embed(y)                              # (B, width)
        return torch.einsum("bc,bc...->b...", weight, h) + self.linear.bias


class UNetDiscriminator(nn.Module):
    """D^Unet: is an image of class y real, as a whole and pixel by pixel (appendix A.1)?

    x (B, channels, S, S) in [-1, 1], y (B,) -> logit (B,), pixel_logits (B, 1, S, S), positive for
    real. Both heads are conditional: Eq. 5 writes D_dec(x', y), Eq. 6 D_dec(x'); the authors' code
    conditions both.
    """

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
        h1 = self.down1(x)                                                       # (B, ch, S/2, S/2)
        h2 = self.down2(h1)                                                      # (B, 4ch, S/4, S/4)
        h3 = self.down3(h2)                                                      # (B, 16ch, S/8, S/8)
        logit = self.image_head(F.relu(h3).sum((2, 3)), y)                       # (B,)
        u = self.up1(h3)                                                         # (B, 4ch, S/4, S/4)
        u = self.up2(torch.cat([u, h2], 1))                                      # (B, ch, S/2, S/2)
        u = self.up3(torch.cat([u, h1], 1))                                      # (B, ch, S, S)
        return logit, self.pixel_head(F.relu(u), y)[:, None]                     # (B, 1, S, S)


# ---------------------------------------------------------------------------------------------
# Losses (Eq. 2 to 6). -log sigmoid(l) is softplus(-l); -log(1 - sigmoid(l)) is softplus(l).

def discriminator_loss(real_logit, real_pixels, fake_logit, fake_pixels):
    """Eq. 3 = Eq. 4 (image) + Eq. 5 (pixels): logits (B,), pixel logits (B, 1, H, W) -> scalar.
    The paper sums Eq. 5 over pixels; the mean here, as in the authors' code, keeps both terms of
    one size at any image size."""
    image = F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()
    pixel = F.softplus(-real_pixels).mean() + F.softplus(fake_pixels).mean()
    return image + pixel


def generator_loss(fake_logit, fake_pixels, x_fake, x, adv=1.0, l1=1.0, l2=1.0, ssim_weight=1.0):
    """Eq. 6: fool both heads and resemble x: logits (B,), pixel logits (B, 1, H, W), images
    (B, C, H, W) in [-1, 1] -> scalar. Pixel terms are means; the paper adds SSIM, which must shrink
    as images grow alike, hence 1 - SSIM. The weights are 1 in Eq. 6; train_gen.py says what it
    takes and why."""
    adversarial = F.softplus(-fake_logit).mean() + F.softplus(-fake_pixels).mean()
    return (adv * adversarial + l1 * F.l1_loss(x_fake, x) + l2 * F.mse_loss(x_fake, x)
            + ssim_weight * (1 - ssim(x_fake, x).mean()))


def hinge_loss(right, wrong):
    """Eq. 2: C_b's scores of right-label and of wrong-label pairs, (B,) each -> scalar."""
    return F.relu(1 - right).mean() + F.relu(1 + wrong).mean()


def ssim(x, y):
    """Structural similarity of images (B, C, H, W) in [-1, 1], sides of at least 11 -> (B,), 1 = equal.
    11 x 11 Gaussian window, sigma 1.5, valid convolution, C1 = 0.01^2, C2 = 0.03^2 on [0, 1]."""
    g = torch.exp(-(torch.arange(11, device=x.device, dtype=x.dtype) - 5).square() / (2 * 1.5**2))
    g = g / g.sum()

    def band(n):  # a valid convolution along one axis, as an (n - 10, n) matrix
        return torch.stack([F.pad(g, (i, n - 11 - i)) for i in range(n - 10)])

    rows, cols = band(x.shape[2]), band(x.shape[3]).T
    blur = lambda t: rows @ t @ cols
    x, y = (x + 1) / 2, (y + 1) / 2
    mx, my, xx, yy, xy = blur(torch.stack([x, y, x * x, y * y, x * y]))
    value = ((2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
             / ((mx * mx + my * my + 1e-4) * (xx - mx * mx + yy - my * my + 9e-4)))
    return value.mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------
# Scorer (section 3.5, Figure 3): the conditional binary classifier

class BinaryScorer(nn.Module):
    """C_b: does x' show what x shows, given that x' was made for label y?

    x, x' (B, channels, S, S) in [-1, 1], y (B,) -> (B,), higher = in-distribution (the authors' code
    has the opposite sign). BigGAN's small discriminator on the concatenated pair, 2ch wide; the
    authors' self-attention at S/2 (2% of the parameters) is left out, the paper has none.
    """

    def __init__(self, num_classes, ch=32, channels=3):
        super().__init__()
        self.settings = dict(num_classes=num_classes, ch=ch, channels=channels)
        self.blocks = nn.Sequential(DownBlock(2 * channels, 2 * ch, first=True),
                                    DownBlock(2 * ch, 2 * ch),
                                    DownBlock(2 * ch, 2 * ch, down=False),
                                    DownBlock(2 * ch, 2 * ch, down=False))
        self.head = Projection(2 * ch, num_classes)

    def forward(self, x, x_fake, y):
        h = self.blocks(torch.cat([x, x_fake], 1))                               # (B, 2ch, S/4, S/4)
        return self.head(F.relu(h).sum((2, 3)), y)                               # (B,)


# ---------------------------------------------------------------------------------------------
# Image quality (section 3.5): LPIPS [53] and DISTS [8]

WEIGHT_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth",
                "squeeze": "squeezenet1_1-b8a52dc0.pth"}
DISTS_URL = "https://raw.githubusercontent.com/dingkeyan93/DISTS/master/DISTS_pytorch/weights.pt"
DISTS_SHA256 = "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"


def _with_weights(file, load):
    """load(), which may download `file`; a failure becomes one line that says what to do."""
    try:
        with warnings.catch_warnings():  # lpips calls torchvision by its old keyword
            warnings.simplefilter("ignore", UserWarning)
            return load()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(f"no usable weights {file} ({str(error).splitlines()[0]}): put the file into "
                      f"{torch.hub.get_dir()}/checkpoints (TORCH_HOME moves that folder), or run "
                      "without it: --scorers cb ssim") from error


def _for_perception(x):
    """Grey to three channels, sides under 32 to 32: the pretrained nets know nothing smaller."""
    x = x.expand(-1, 3, -1, -1)
    if min(x.shape[2:]) < 32:
        x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    return x


class LPIPS(nn.Module):
    """Perceptual distance of Zhang et al. [53], by the lpips package; net "vgg" (the cost in Table 13
    is that of a VGG16), "alex" or "squeeze". x, x' (B, 1 or 3, H, W) in [-1, 1] -> (B,), 0 = equal.
    Raises OSError when the backbone's weights can be neither found nor downloaded."""

    def __init__(self, net="vgg"):
        super().__init__()
        import lpips  # takes a second; detectors without it start faster
        if net not in WEIGHT_FILES:
            raise ValueError(f"LPIPS knows {', '.join(WEIGHT_FILES)}, not {net!r}")
        self.settings = dict(net=net)
        self.metric = _with_weights(WEIGHT_FILES[net], lambda: lpips.LPIPS(net=net, verbose=False))
        self.requires_grad_(False).eval()

    def forward(self, x, x_fake):
        return self.metric(_for_perception(x), _for_perception(x_fake)).flatten()


class DISTS(nn.Module):
    """Structure and texture distance of Ding et al. [8], on torchvision's VGG16.

    x, x' (B, 1 or 3, H, W) in [-1, 1] -> (B,), 0 = equal. The stages are the image and relu1_2, 2_2,
    3_3, 4_3, 5_3; for each channel the means compare texture (S1), the covariance structure (S2),
    and learned weights alpha, beta mix them. Raises OSError without the weights.
    """

    def __init__(self):
        super().__init__()
        from torchvision.models import vgg16
        self.settings = {}
        vgg = _with_weights(WEIGHT_FILES["vgg"], lambda: vgg16(weights="IMAGENET1K_V1")).features
        # cut at the max pools: L2 pooling takes their place
        self.stages = nn.ModuleList([vgg[0:4], vgg[5:9], vgg[10:16], vgg[17:23], vgg[24:30]])
        learned = _with_weights("dists_alpha_beta.pt", self._alpha_beta)
        self.register_buffer("alpha", learned["alpha"].flatten())                # (1475,)
        self.register_buffer("beta", learned["beta"].flatten())
        window = torch.hann_window(5, periodic=False)[1:-1]
        self.register_buffer("window", torch.outer(window, window) / window.sum()**2)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.requires_grad_(False).eval()

    @staticmethod
    def _alpha_beta():
        path = Path(torch.hub.get_dir(), "checkpoints", "dists_alpha_beta.pt")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(DISTS_URL, str(path), DISTS_SHA256, progress=False)
        if hashlib.sha256(path.read_bytes()).hexdigest() != DISTS_SHA256:
            raise OSError("its SHA-256 is not that of the published file")
        return torch.load(path, map_location="cpu", weights_only=True)

    def _features(self, x):
        x = (_for_perception(x) + 1) / 2  # DISTS takes [0, 1]
        features, h = [x], (x - self.mean) / self.std
        for i, stage in enumerate(self.stages):
            if i:
                window = self.window.expand(h.shape[1], 1, 3, 3)
                h = (F.conv2d(h.square(), window, stride=2, padding=1, groups=h.shape[1])
                     + 1e-12).sqrt()
            h = stage(h)
            features.append(h)
        return features

    def forward(self, x, x_fake):
        s1, s2, c = [], [], 1e-6
        for a, b in zip(self._features(x), self._features(x_fake)):
            ma, mb = a.mean((2, 3)), b.mean((2, 3))                              # (B, C)
            va, vb = a.var((2, 3), correction=0), b.var((2, 3), correction=0)
            cov = (a * b).mean((2, 3)) - ma * mb
            s1.append((2 * ma * mb + c) / (ma.square() + mb.square() + c))
            s2.append((2 * cov + c) / (va + vb + c))
        similarity = torch.cat(s1, 1) @ self.alpha + torch.cat(s2, 1) @ self.beta
        return 1 - similarity / (self.alpha.sum() + self.beta.sum())


# ---------------------------------------------------------------------------------------------
# Detector (Figure 2; the cascade of section 3.5)

SHARES = 10  # the cascade's budget is shared out in tenths


class Energy:
    """The classifier's energy as one more scorer, a departure from the paper: x, x' (B, C, H, W) -> (B,),
    minus the log-sum-exp of the logits C(x). x' plays no part. The classifier is on the detector's device
    and in eval()."""

    def __init__(self, classifier):
        self.classifier = classifier

    def __call__(self, x, x_fake):
        return -self.classifier(x).float().logsumexp(1)


def folded(net):
    """A copy of a Generator or BinaryScorer for inference: the same function in eval() with spectral
    norms and the encoder's batch norms multiplied into plain weights."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # built anew: a deepcopy shares what is removed here
        net = type(net)(**net.settings).eval()
    net.load_state_dict(state, assign=True)
    for module in list(net.modules()):
        if is_parametrized(module):
            remove_parametrizations(module, "weight")
        if isinstance(module, Encoder):
            layers = module.features
            for i in range(1, len(layers)):
                if isinstance(layers[i], nn.BatchNorm2d):
                    layers[i - 1] = fuse_conv_bn_eval(layers[i - 1], layers[i])
                    layers[i] = nn.Identity()
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


class MoodCat:
    """The detector, for any classifier: x is rejected when its synthesis under y = C(x) differs.

    generator: a trained Generator; scorers: {name: scorer}, each a BinaryScorer, `ssim`, or a callable
    (x, x') -> distance (B,) such as LPIPS(), DISTS() and Energy(classifier). mask_ratio and mask_style go
    to random_mask; a score is the mean over `masks` of them (the paper: 1). The masks of an image depend
    on the seed and that image's pixels alone, so it gets the same score in any batch, order or process.
    bf16: Generator and BinaryScorer compute in bfloat16.
    """

    def __init__(self, generator, scorers, mask_ratio=(0.1, 0.3), mask_style="random", seed=0,
                 masks=1, bf16=False):
        if not scorers:
            raise ValueError("a detector needs at least one scorer")
        self.generator, self.scorers = generator, dict(scorers)
        self.mask_ratio, self.mask_style = mask_ratio, mask_style
        self.seed, self.masks, self.bf16 = seed, masks, bf16
        self.device = next(generator.parameters()).device
        for net in (generator, *self.scorers.values()):
            if isinstance(net, nn.Module):
                net.to(self.device).eval()
            if isinstance(net, BinaryScorer) and any(
                    net.settings[k] != generator.settings[k] for k in ("num_classes", "channels")):
                raise ValueError(f"C_b is for {net.settings}, the generator for {generator.settings}")
        self._generator = folded(generator)  # the same nets, faster
        self._scorers = {name: folded(scorer) if isinstance(scorer, BinaryScorer) else scorer
                         for name, scorer in self.scorers.items()}
        self.calibration = None  # what calibrate() fixes

    def mask(self, x, draw=0):
        """x (B, C, H, W) in [-1, 1] -> x_m, mask as random_mask; an image's draw-th, the same every
        time."""
        draws = []
        for image in ((x + 1) * 127.5).round().byte().cpu().numpy():
            # 8-bit pixels: equal on every device
            seed = zlib.crc32(image.tobytes(), 1000 * self.seed + draw)
            draws.append(torch.rand(DRAWS, generator=torch.Generator().manual_seed(seed)))
        return _mask_by(torch.stack(draws), x, self.mask_ratio, self.mask_style)

    @torch.no_grad()
    def synthesise(self, x, y, draw=0):
        """x (B, C, H, W) in [-1, 1], y (B,) -> x_m, x', both (B, C, H, W), with the draw-th mask."""
        x_m, _ = self.mask(x, draw)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return x_m, self._generator(x_m, y)[0].float()

    @torch.no_grad()
    def score(self, x, y):
        """Scores of images under their predicted labels, higher = in-distribution.

        x: (B, C, S, S) float in [-1, 1]; y: (B,) integers, normally C(x). Returns {name: (B,)} with
        distances negated and, once calibrated, "cascade" (float64). Raises ValueError for input of
        another kind.
        """
        scores = self._scores(*self._check(x, y))
        if self.calibration:
            scores["cascade"] = cascade(scores, self.calibration).to(self.device)
        return scores

    def _scores(self, x, y):
        """score() of checked images, without the cascade."""
        chunk = 512 if x.is_cuda else 32  # on a CPU small chunks stay in the cache
        scores = {name: torch.zeros(len(x), device=x.device) for name in self.scorers}
        for i in range(0, len(x), chunk):
            part = slice(i, i + chunk)
            for draw in range(self.masks):
                _, x_fake = self.synthesise(x[part], y[part], draw)
                for name, scorer in self._scorers.items():
                    if isinstance(scorer, BinaryScorer):
                        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                            value = scorer(x[part], x_fake, y[part]).float()
                    else:
                        value = scorer(x[part], x_fake) * (1 if scorer is ssim else -1)
                    scores[name][part] += value / self.masks
        return scores

    @torch.no_grad()
    def wrong_label_scores(self, x, y_wrong):
        """The `wrong` of fit_cascade, {name: (B,)}: scores of images under labels that are wrong, of the
        scorers that a label changes. x (B, C, S, S), y_wrong (B,). Raises ValueError as score() does."""
        return {name: s for name, s in self._scores(*self._check(x, y_wrong)).items()
                if not isinstance(self.scorers[name], Energy)}

    @torch.no_grad()
    def calibrate(self, x, y, tpr=0.95, y_wrong=None):
        """Fix the cascade on held-out in-distribution images (see fit_cascade). Returns self.

        x (N, C, S, S), y (N,) = C(x), y_wrong (N,) the classifier's second guess, or None.
        """
        x, y = self._check(x, y)
        wrong = None
        if y_wrong is not None:
            _, y_wrong = self._check(x, y_wrong)
            if bool((y_wrong == y).any()):
                raise ValueError("y_wrong must hold another label than y")
            wrong = self.wrong_label_scores(x[0::2], y_wrong[0::2])
        self.calibration = fit_cascade(self._scores(x, y), wrong, tpr)
        return self

    def is_ood(self, x, y):
        """True where an image is rejected: x (B, C, S, S) in [-1, 1], y (B,) = C(x) -> bool (B,)."""
        if not self.calibration:
            raise ValueError("calibrate the detector before asking for verdicts")
        return self.score(x, y)["cascade"] < self.calibration["threshold"]

    def _check(self, x, y):
        """Images and labels on the detector's device, or a ValueError that says what is wrong."""
        want = self.generator.settings
        shape = (want["channels"], want["image_size"], want["image_size"])
        if not torch.is_tensor(x) or not x.is_floating_point():
            raise ValueError("images must be a float tensor in [-1, 1]; for uint8, x / 127.5 - 1")
        if x.ndim != 4 or x.shape[1:] != shape or not len(x):
            raise ValueError(f"images are {tuple(x.shape)}, the detector takes (B, {shape[0]}, "
                             f"{shape[1]}, {shape[2]})")
        x = x.to(self.device, torch.float32)
        if not bool(((x >= -1.001) & (x <= 1.001)).all()):  # False for NaN, too
            raise ValueError("images must lie in [-1, 1] and be finite")
        y = torch.as_tensor(y).to(self.device)
        if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"labels must be integers of shape ({len(x)},), one an image")
        if bool(((y < 0) | (y >= want["num_classes"])).any()):
            raise ValueError(f"labels must lie in 0 to {want['num_classes'] - 1}")
        return x.clamp(-1, 1), y.long()

    def save(self, path, half=False):
        """Everything needed to deploy beside the classifier, in one file; LPIPS and DISTS by name; half:
        weights in float16, as they must have been when the thresholds were fixed. Raises OSError."""
        scorers, stored = {}, in_half if half else lambda weights: weights
        for name, scorer in self.scorers.items():
            if scorer is ssim:
                scorers[name] = dict(kind="ssim")
            elif isinstance(scorer, Energy):
                scorers[name] = dict(kind="Energy")
            elif isinstance(scorer, (LPIPS, DISTS)):
                scorers[name] = dict(kind=type(scorer).__name__, settings=scorer.settings)
            elif isinstance(scorer, BinaryScorer):
                scorers[name] = dict(kind="BinaryScorer", settings=scorer.settings,
                                     weights=stored(scorer.state_dict()))
            else:
                raise ValueError(f"cannot save scorer {name!r}: a {type(scorer).__name__}")
        save_checkpoint(path, dict(
            kind="detector", settings=self.generator.settings, scorers=scorers,
            weights=stored(self.generator.state_dict()), calibration=self.calibration,
            mask=dict(mask_ratio=self.mask_ratio, mask_style=self.mask_style, seed=self.seed,
                      masks=self.masks, bf16=self.bf16)))

    @classmethod
    def load(cls, path, device="cpu", classifier=None):
        """The detector that save() wrote; classifier: images (B, C, S, S) to logits (B, K), for one with
        Energy. Raises OSError or ValueError."""
        saved = load_checkpoint(path, "detector", device)
        generator = load_weights(Generator(**saved["settings"]), saved["weights"], path)
        scorers = {}
        for name, part in saved["scorers"].items():
            if part["kind"] == "ssim":
                scorers[name] = ssim
            elif part["kind"] == "Energy":
                if classifier is None:
                    raise ValueError(f"{path} scores by the classifier's energy, too: give the classifier")
                scorers[name] = Energy(classifier)
            else:
                kinds = dict(BinaryScorer=BinaryScorer, LPIPS=LPIPS, DISTS=DISTS)
                scorers[name] = kinds[part["kind"]](**part["settings"])
            if "weights" in part:
                load_weights(scorers[name], part["weights"], path)
        detector = cls(generator.to(device), scorers, **saved["mask"])
        detector.calibration = saved["calibration"]
        return detector


def fit_cascade(scores, wrong=None, tpr=0.95):
    """Ranks, shares and threshold of the cascade, so that a share `tpr` of fresh in-distribution
    images is accepted, as a dictionary for cascade().

    scores {name: (N,)}: held-out in-distribution images under y = C(x); wrong {name: (N / 2,)}: the
    even ones under the classifier's second guess. With `wrong` the even images choose the scorers'
    shares of the rejection budget, right label against wrong, and the odd ones fix ranks and
    threshold; a scorer that is not in `wrong`, as no label changes it, keeps an equal share. Without,
    all shares are equal and all images fix the rest. Raises ValueError for too few.
    """
    scores = {name: s.cpu().double() for name, s in scores.items()}
    shares = {name: 1 / len(scores) for name in scores}
    if wrong:
        right = {name: s[0::2] for name, s in scores.items()}
        knots = {name: _knots(right[name]) for name in wrong}
        right = {name: _rank(right[name], *knots[name]) for name in wrong}
        wrong = {name: _rank(s, *knots[name]) for name, s in wrong.items()}
        best = max(_all_shares(list(wrong)),
                   key=lambda w: auroc(_cascade(right, w), _cascade(wrong, w)))
        shares.update({name: share * len(wrong) / len(scores) for name, share in best.items()})
        scores = {name: s[1::2] for name, s in scores.items()}
    n = len(next(iter(scores.values())))
    # accepting down to the k-th largest of n accepts a fresh image with probability k / (n + 1)
    k = math.ceil(tpr * (n + 1) - 1e-9)
    if not 0 < tpr < 1 or k > n:
        raise ValueError(f"{n} images cannot fix a threshold for a TPR of {tpr}: give more")
    calibration = dict(ranks={name: _knots(s) for name, s in scores.items()}, shares=shares, tpr=tpr,
                       n=n)
    values = cascade(scores, calibration).sort(descending=True).values
    return dict(calibration, threshold=values[k - 1].item())


def cascade(scores, calibration):
    """Scores {name: (B,)} -> the cascade's (B,) float64 (section 3.5), below
    calibration["threshold"] for what it rejects; fit_cascade gives the calibration."""
    return _cascade({name: _rank(scores[name], *knots)
                     for name, knots in calibration["ranks"].items()}, calibration["shares"])


def _knots(scores):
    """Held-out scores (N,) -> distinct scores, ascending, and their ranks in (0, 1), float64."""
    values, counts = scores.cpu().double().unique(return_counts=True)
    ranks = (counts.cumsum(0) - counts + (counts.double() + 1) / 2) / (len(scores) + 1)
    if len(values) == 1:  # a constant score still needs a slope
        values, ranks = torch.cat([values, values + 1]), torch.cat([ranks, ranks + 1])
    return values, ranks


def _rank(scores, values, ranks):
    """Scores (B,) -> ranks among the held-out scores, float64: linear between them, continued
    beyond both ends with the mean slope, so that distinct scores never tie."""
    s = scores.cpu().double().contiguous()
    values, ranks = values.cpu(), ranks.cpu()
    i = torch.searchsorted(values, s).clamp(1, len(values) - 1)
    inside = ranks[i - 1] + (s - values[i - 1]) * ((ranks[i] - ranks[i - 1])
                                                   / (values[i] - values[i - 1]))
    slope = (ranks[-1] - ranks[0]) / (values[-1] - values[0])
    return torch.where(s < values[0], ranks[0] + (s - values[0]) * slope,
                       torch.where(s > values[-1], ranks[-1] + (s - values[-1]) * slope, inside))


def _cascade(ranks, shares):
    """Section 3.5, any scorer that flags rejects: the smallest rank / share. {name: (B,)} -> (B,).
    Below a threshold t a scorer flags the share * t lowest of the in-distribution images."""
    return torch.stack([ranks[name] / share for name, share in shares.items() if share]).min(0).values


def _all_shares(names):
    """Every way to share a budget of 1 among the scorers in tenths, the most even first."""
    ways = [w for w in product(range(SHARES + 1), repeat=len(names)) if sum(w) == SHARES]
    ways.sort(key=lambda w: max(w) - min(w))
    return [dict(zip(names, (n / SHARES for n in w))) for w in ways]


def auroc(high, low):
    """Probability that one of `high` (N,) exceeds one of `low` (M,), ties counting half."""
    low = low.sort().values
    below, upto = (torch.searchsorted(low, high.contiguous(), right=r) for r in (False, True))
    return ((below + upto).double().mean() / (2 * len(low))).item()


# ---------------------------------------------------------------------------------------------
# Checkpoints: one dictionary, never half-written, never executed on loading

def save_checkpoint(path, content):
    """Write content, a dict with "kind", to a temporary file beside `path`, then rename it: what was
    there before stays whole until then. Raises OSError."""
    path = Path(path)
    buffer = io.BytesIO()
    torch.save({**content, "format": "moodcat 1", "torch": str(torch.__version__)}, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); any earlier {path.name} is whole: "
                      "make room or choose another --run, then go on with --resume") from error


def in_half(weights):
    """A state dictionary with float16 for every floating-point tensor, to be half the size on disk;
    load_state_dict widens it again. Raises ValueError for a weight beyond float16."""
    rounded = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    if not all(bool(v.isfinite().all()) for v in rounded.values()):
        raise ValueError("a weight is too large for half precision (65504)")
    return rounded


def load_checkpoint(path, kind, device="cpu"):
    """The dict that save_checkpoint wrote, of that kind. Raises OSError (missing) or ValueError
    (damaged, foreign, another kind)."""
    if not Path(path).is_file():
        raise OSError(f"{path} does not exist")
    content = io.BytesIO(Path(path).read_bytes())
    try:
        saved = torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes can fail anywhere in the unpickler
        raise ValueError(f"{path} is damaged or no checkpoint; delete it and train again") from error
    if not isinstance(saved, dict) or saved.get("format") != "moodcat 1":
        raise ValueError(f"{path} is not a checkpoint of this project")
    if saved["kind"] != kind:
        raise ValueError(f"{path} holds a {saved['kind']}, not a {kind}")
    return saved


def load_weights(net, weights, path):
    """net with the weights that stood in the file `path`. Raises ValueError when they do not fit."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} holds a {type(net).__name__} of another width, image size or number "
                         "of classes") from error
    return net
