"""pytest -q test_moodcat.py: formulas against second implementations, scripts for real; offline."""

import argparse
import ast
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import moodcat
import train_gen
import train_scorer
from evaluate import ood_metrics
from moodcat import (DISTS, LPIPS, BinaryScorer, Decoder, Encoder, Generator, ImageMask, MoodCat,
                     UNetDiscriminator, discriminator_loss, fit_calibration, generator_loss,
                     hinge_loss, joint_scores, kl_divergence, load_checkpoint, log_p_values,
                     random_mask, save_checkpoint, ssim)
from train_gen import Split, image_files, read_images, to_float

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # nets this small only wait for a second thread
NETS = ("generator", "classifier", "scorer")

def images(n, channels=1, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator) * 2 - 1

def tiny_detector(scorers=None, **options):
    torch.manual_seed(0)
    own = {"cb": BinaryScorer(3, 2, 1), "ssim": lambda x, x_fake, y: ssim(x, x_fake)}
    return MoodCat(Generator(3, 2, 16, 1), scorers or own, **options)

def same(a, b):  # bit for bit
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b

def start(main, *argv):
    main([*map(str, argv)] if "--device" in argv else [*map(str, argv), "--device", "cpu"])

def load(run, name):
    return load_checkpoint(Path(run, f"{name}.pt"), name)

def complaint(main, *argv):
    """The one line that main(argv) ends in."""
    with pytest.raises(SystemExit) as stop:
        train_gen.run_script(lambda: start(main, *argv))
    stop.value.__context__ = None  # its frames would hold the lock of a run
    assert "\n" not in str(stop.value)
    return str(stop.value)

@pytest.mark.parametrize("size", [16, 32, 64])
def test_random_mask_is_a_rectangle_inside_the_ratio(size):
    x, seeded = images(2000, 1, size), torch.Generator()
    x_m, mask = random_mask(x, generator=seeded.manual_seed(1))
    assert mask.shape == (2000, 1, size, size) and mask.dtype == torch.bool  # True = removed
    assert torch.equal(x_m, torch.where(mask, 0, x))
    h, w = mask.any(3).sum(2)[:, 0], mask.any(2).sum(2)[:, 0]
    assert (h * w == mask.sum((1, 2, 3))).all()
    share, covered = h * w / size**2, mask.float().mean(0)[0]
    assert share.min() >= 0.1 and share.max() <= 0.3
    assert abs(share.mean() - 0.2) < 0.01 and abs(share.std() - 0.2 / 12**0.5) < 0.01  # uniform
    assert 0.4 <= (h / w).min() < 0.6 and 1.8 < (h / w).max() <= 2.5
    assert (covered > 0).float().mean() > 0.99  # anywhere, in no favoured corner
    assert torch.allclose(covered, covered.flip(0, 1), atol=0.08)
    assert torch.equal(random_mask(x, generator=seeded.manual_seed(1))[1], mask)
    for ratio in (0, 0.3, 1):
        assert abs(random_mask(x, ratio)[1].float().mean() - ratio) <= 0.01, ratio
    for bad in ((0.3, 0.1), 1.5, -0.1):
        with pytest.raises(ValueError, match="mask ratio"):
            random_mask(x, bad)

def test_an_image_mask_follows_pixels_seed_and_count_alone():
    x, mask, order = images(60), ImageMask(), torch.randperm(60)
    whole = mask(x)[1]
    assert torch.equal(mask(x[order])[1], whole[order]) and torch.equal(mask(x[7:8])[1], whole[7:8])
    assert torch.equal(mask(to_float(((x + 1) * 127.5).round()) + 1e-4)[1], whole)  # 8 bits
    for other in (ImageMask(seed=1)(x)[1], mask(x, 1)[1], mask(x.flip(3))[1]):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9

@pytest.mark.parametrize("size, channels", [(16, 1), (24, 3), (32, 3), (64, 3)])
def test_shapes_ranges_and_parameter_counts(size, channels):
    x, y = images(3, channels, size), torch.tensor([0, 1, 4])
    x_fake, mu, logvar = Generator(5, 4, size, channels)(x, y)
    assert x_fake.shape == x.shape and x_fake.abs().max() <= 1
    assert mu.shape == logvar.shape == (3, 128)
    logit, pixels = UNetDiscriminator(5, 4, channels)(x, y)
    assert logit.shape == (3,) and pixels.shape == (3, 1, size, size)
    assert BinaryScorer(5, 4, channels)(x, x_fake, y).shape == (3,)
    nets = Encoder(), Decoder(10), UNetDiscriminator(10), BinaryScorer(10)
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts == [460_928, 3_821_955, 4_145_474, 267_329]  # E and D: the authors'

def test_losses_against_second_implementations():
    mu, logvar = torch.randn(5, 128), torch.randn(5, 128)
    ours, unit = (torch.distributions.Normal(*p) for p in ((mu, (logvar / 2).exp()), (0.0, 1.0)))
    theirs = torch.distributions.kl_divergence(ours, unit).sum(1)
    assert torch.allclose(kl_divergence(mu, logvar), theirs, rtol=1e-4), "Eq. 1"
    real, fake = torch.randn(4), torch.randn(4)
    real_px, fake_px = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    is_real = lambda t: F.binary_cross_entropy_with_logits(t, torch.ones_like(t))
    is_fake = lambda t: F.binary_cross_entropy_with_logits(t, torch.zeros_like(t))
    assert torch.isclose(discriminator_loss(real, real_px, fake, fake_px),
                         is_real(real) + is_fake(fake) + is_real(real_px) + is_fake(fake_px)), (
        "Eq. 3 to 5")
    x, y = images(4), images(4, seed=1)
    theirs = (2 * (is_real(fake) + is_real(fake_px)) + 3 * (x - y).abs().mean()
              + 5 * (x - y).square().mean() + 7 * (1 - ssim(x, y)).mean())
    assert torch.isclose(generator_loss(fake, fake_px, x, y, 2, 3, 5, 7), theirs), "Eq. 6"
    # Eq. 2: relu(1 - 2), relu(1 - 0.5), relu(1 + 3) | relu(1 - 2), relu(1 + 0), relu(1 + 1)
    ours = hinge_loss(torch.tensor([2.0, 0.5, -3.0]), torch.tensor([-2.0, 0.0, 1.0]))
    assert torch.isclose(ours, torch.tensor((0 + 0.5 + 4) / 3 + (0 + 1 + 2) / 3)), "Eq. 2"

# --- The method line by line: nets, losses and steps against plain second versions --------------
@torch.no_grad()
def weights_of(net):
    """A net's weights by their names in checkpoints, as they are used: spectral norms divided."""
    training = net.training
    used = {k: v.clone() for k, v in net.eval().state_dict().items() if "parametri" not in k}
    used.update({f"{name}.weight": module.weight.clone() for name, module in net.named_modules()
                 if hasattr(module, "parametrizations")})
    net.train(training)
    return used

def worn(net, *inputs):
    """The net in float64 and eval(), with weights and statistics unlike those of a fresh one."""
    with torch.no_grad():
        for p in net.double().parameters():
            p += 0.3 * torch.randn_like(p) / max(p.numel() / len(p), 4) ** 0.5
        for _ in range(3):
            net(*inputs)
    return net.eval()

def plain_conv(w, name, x, padding=1, stride=1):
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)

def plain_linear(w, name, h):
    return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

def plain_norm(w, name, x):
    wide = lambda part: w[f"{name}.{part}"][:, None, None]
    x = (x - wide("running_mean")) / (wide("running_var") + 1e-5).sqrt()
    return x * wide("weight") + wide("bias") if f"{name}.weight" in w else x

def plain_conditional_norm(w, name, x, e):
    gain, bias = (plain_linear(w, f"{name}.{k}", e)[:, :, None, None] for k in ("gain", "bias"))
    return (1 + gain) * plain_norm(w, f"{name}.norm", x) + bias

def plain_up(w, name, x, e=None):  # the skip in the order of the figure: first up, then 1 x 1
    up = lambda h: h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    norm = lambda k, h: h if e is None else plain_conditional_norm(w, f"{name}.norm{k}", h, e)
    h = plain_conv(w, f"{name}.conv1", up(norm(1, x).relu()))
    h = plain_conv(w, f"{name}.conv2", norm(2, h).relu())
    return h + plain_conv(w, f"{name}.skip", up(x), 0)

def plain_down(w, name, x, first=False, down=True):  # first 1 x 1, then the mean of each 2 x 2
    h = plain_conv(w, f"{name}.conv1", x if first else x.relu()).relu()
    h = plain_conv(w, f"{name}.conv2", h)
    h = h + (plain_conv(w, f"{name}.skip", x, 0) if f"{name}.skip.weight" in w else x)
    return h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)) if down else h

def plain_projection(w, name, h, y):
    h, own = h.movedim(1, -1), w[f"{name}.embed.weight"][y]
    own = own.view(len(y), *[1] * (h.dim() - 2), -1)
    return (plain_linear(w, f"{name}.linear", h))[..., 0] + (own * h).sum(-1)

def plain_encoder(w, x):
    h = F.leaky_relu(plain_conv(w, "features.0", x, 1, 2), 0.2)
    for conv, norm in ((2, 3), (5, 6)):
        h = plain_norm(w, f"features.{norm}", plain_conv(w, f"features.{conv}", h, 1, 2))
        h = F.leaky_relu(h, 0.2)
    h = F.leaky_relu(plain_conv(w, "features.8", h, 0), 0.2).flatten(1)
    return plain_linear(w, "mu", h), plain_linear(w, "logvar", h)

def plain_decoder(w, z, y):
    e, h = w["embed.weight"][y], plain_linear(w, "first", z)
    width = w["blocks.0.conv1.weight"].shape[1]
    side = int((h.shape[1] / width) ** 0.5)
    h = h.view(len(z), width, side, side)
    for i in range(3):
        h = plain_up(w, f"blocks.{i}", h, e)
    return (plain_conv(w, "last.2", plain_norm(w, "last.0", h).relu()).tanh(),)

def plain_unet(w, x, y):
    h1 = plain_down(w, "down1", x, first=True)
    h2 = plain_down(w, "down2", h1)
    h3 = plain_down(w, "down3", h2)
    u = plain_up(w, "up1", h3)
    u = plain_up(w, "up2", torch.cat([u, h2], 1))
    u = plain_up(w, "up3", torch.cat([u, h1], 1))
    pixels = plain_projection(w, "pixel_head", u.relu(), y)
    return plain_projection(w, "image_head", h3.relu().sum((2, 3)), y), pixels[:, None]

def plain_scorer(w, x, x_fake, y):
    h = torch.cat([x, x_fake], 1)
    for i in range(4):
        h = plain_down(w, f"blocks.{i}", h, first=i == 0, down=i < 2)
    return (plain_projection(w, "head", h.relu().sum((2, 3)), y),)

@pytest.mark.parametrize("make, plain, outputs", [
    (lambda: Encoder(2, 16, 3, 5), plain_encoder, ["mu", "logvar"]),
    (lambda: Decoder(4, 2, 16, 3, 5), plain_decoder, ["x'"]),
    (lambda: UNetDiscriminator(4, 2, 3), plain_unet, ["image logit", "pixel logits"]),
    (lambda: BinaryScorer(4, 2, 3), plain_scorer, ["score"])], ids=["E", "D", "D^Unet", "C_b"])
def test_each_net_against_a_plain_second_version(make, plain, outputs):
    """The label's path, the skips of the U-Net, the blocks, the two heads of E."""
    torch.manual_seed(0)
    x, y, z = images(6, 3).double(), torch.arange(6) % 4, torch.randn(6, 5).double()
    inputs = {plain_encoder: (x,), plain_decoder: (z, y), plain_unet: (x, y),
              plain_scorer: (x, x.flip(0), y)}[plain]
    net = worn(make(), *inputs)
    with torch.no_grad():
        ours, theirs = net(*inputs), plain(weights_of(net), *inputs)
    for name, a, b in zip(outputs, [ours] if torch.is_tensor(ours) else ours, theirs):
        fine = a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)
        assert fine, f"{name} is not that of the layers in their order"

def test_spectral_norm_and_an_orthogonal_start_in_every_layer_of_biggan():
    torch.manual_seed(0)
    x, y = images(4, 3), torch.arange(4)
    for net, inputs in ((Decoder(4, 2, 16), (torch.randn(4, 128), y)),
                        (UNetDiscriminator(4, 2), (x, y)), (BinaryScorer(4, 2), (x, x, y))):
        layers = {k: v.flatten(1) for k, v in weights_of(net).items() if v.dim() > 1}
        for name, weight in layers.items():
            values = torch.linalg.svdvals(weight)
            assert (values - 1).abs().max() < 1e-4, f"{name} does not start orthogonal"
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(3 * p + torch.randn_like(p))
            for _ in range(60):
                net(*inputs)
        used = weights_of(net)
        for name in layers.keys() - {"embed.weight"}:  # the decoder's labels: no layer
            norm = torch.linalg.matrix_norm(used[name].flatten(1), 2)
            assert abs(norm - 1) < 0.05, f"{name} has no spectral norm: {norm:.3f}"

@pytest.mark.parametrize("training", [True, False])
def test_a_conditional_batch_norm_takes_gain_and_bias_from_the_label(training):
    """(1 + gain(e)) * normalised + bias(e): each alone still carries the label."""
    norm = worn(moodcat.ConditionalBatchNorm(6, 4), torch.randn(8, 6, 5, 5).double(),
                torch.randn(8, 4).double()).train(training)
    x, e = torch.randn(8, 6, 5, 5).double() * 3 + 1, torch.randn(8, 4).double()
    w, got = weights_of(norm), norm(x, e)
    mean, var = w["norm.running_mean"], w["norm.running_var"]
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        w = weights_of(norm)  # the forward pass moved the spectral norm
    straight = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    gain, bias = (e @ w[f"{k}.weight"].T for k in ("gain", "bias"))
    by_hand = (1 + gain)[:, :, None, None] * straight + bias[:, :, None, None]
    assert (gain.std(0) > 0.01).all() and (bias.std(0) > 0.01).all()
    assert torch.allclose(got, by_hand, atol=1e-9), "not (1 + gain(e)) * normalised + bias(e)"

def test_the_label_reaches_the_synthesis_through_every_gain_and_every_bias():
    torch.manual_seed(0)
    decoder, z = moodcat.for_inference(Decoder(3, 2, 16, 1)), torch.randn(3, 128)
    norms = [m for m in decoder.modules() if isinstance(m, moodcat.ConditionalBatchNorm)]
    paths = [(i, kind) for i in range(len(norms)) for kind in ("gain", "bias")]
    assert len(norms) == 6
    whole = deepcopy(decoder.state_dict())
    for i, kind in paths:
        decoder.load_state_dict(whole)
        for j, other in paths:
            if (j, other) != (i, kind):  # all but one path are cut
                getattr(norms[j], other).weight.zero_()
        first, second = decoder(z, torch.tensor([0] * 3)), decoder(z, torch.tensor([1] * 3))
        assert (first - second).abs().amax((1, 2, 3)).min() > 1e-4, f"no label by {kind} {i}"
    for j, other in paths:
        getattr(norms[j], other).weight.zero_()
    assert torch.equal(decoder(z, torch.tensor([0] * 3)), decoder(z, torch.tensor([1] * 3)))

@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 4, 4)])
def test_a_projection_adds_what_the_label_says_of_h(shape):
    head, h, y = moodcat.Projection(6, 3).eval(), torch.randn(shape), torch.tensor([0, 1, 2, 1, 0])
    head.linear.bias.data.fill_(0.7)
    w, own = head.linear.weight[0], head.embed.weight
    for i, label in enumerate(y):
        by_hand = (torch.tensordot(w, h[i], 1) + 0.7 + torch.tensordot(own[label], h[i], 1))
        assert torch.allclose(head(h, y)[i], by_hand, atol=1e-5), "not w.h + b + embed(y).h"

def test_both_heads_of_the_unet_and_the_binary_scorer_see_label_and_images():
    torch.manual_seed(0)
    x, x_fake, y = images(4), images(4, seed=1), torch.tensor([0, 1, 2, 0])
    D, C_b, other = UNetDiscriminator(3, 2, 1).eval(), BinaryScorer(3, 2, 1).eval(), (y + 1) % 3
    for name, a, b in zip(("image", "pixel"), D(x, y), D(x, other)):
        assert ((a - b).abs().flatten() > 1e-5).float().mean() > 0.9, f"the {name} head ignores y"
    for what, inputs in (("y", (x, x_fake, other)), ("x", (x.flip(0), x_fake, y)),
                         ("x'", (x, x_fake.flip(0), y)), ("the order", (x_fake, x, y))):
        assert ((C_b(*inputs) - C_b(x, x_fake, y)).abs() > 1e-5).all(), f"C_b ignores {what}"

def skip_gradient(D, x, y, layer, deeper):
    """How much the pixel logits follow what D's block `layer` puts out, if not through `deeper`."""
    kept = []
    hooks = [getattr(D, layer).register_forward_hook(lambda m, i, out: kept.append(out)),
             getattr(D, deeper).register_forward_hook(lambda m, i, out: out.detach())]
    grad, = torch.autograd.grad(D(x, y)[1].sum(), kept[0], allow_unused=True)
    for hook in hooks:
        hook.remove()
    return 0 if grad is None else grad.abs().sum()

def test_the_unets_skips_reach_the_pixel_logits():
    D, x, y = UNetDiscriminator(3, 2, 1), images(4), torch.tensor([0, 1, 2, 0])
    for layer, deeper in (("down1", "up2"), ("down2", "up1")):
        assert skip_gradient(D, x, y, layer, deeper) > 0, f"the skip from {layer} is cut"

def test_z_is_mu_plus_sigma_times_noise_in_training_and_mu_after_it():
    """Sigma is exp(logvar / 2); the noise is new for each image and each of the dimensions."""
    torch.manual_seed(0)
    G, x, y, seen = Generator(3, 2, 16, 1), images(3000), torch.arange(3000) % 3, []
    G.encoder.logvar.bias.data.fill_(2)  # Sigma is e, its square e^2
    G.decoder.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    _, mu, logvar = G(x, y)
    assert (mu - logvar).abs().max() > 0.5 and (logvar - 2).abs().max() > 0.01  # two heads
    noise = (seen[0] - mu) / (logvar / 2).exp()
    assert noise.mean().abs() < 0.01 and (noise.mean(0).abs() < 0.12).all(), "z is not around mu"
    assert (noise.std(0) - 1).abs().max() < 0.08, "Sigma is not exp(logvar / 2)"
    assert (torch.corrcoef(noise.T) - torch.eye(128)).abs().max() < 0.12, "shared noise"
    assert (noise.pow(4).mean() - 3).abs() < 0.2, "the noise is not normal"
    assert torch.equal(seen[1], y)
    _, mu, _ = G.eval()(x[:9], y[:9])
    assert torch.equal(seen[2], mu), "eval() does not take mu"

def test_a_generator_without_labels_ignores_them():
    x, y = images(6), torch.arange(6) % 3
    for conditional in (True, False):
        G = Generator(3, 2, 16, 1, conditional=conditional).eval()
        unmoved = torch.equal(G(x, y)[0], G(x, (y + 1) % 3)[0])
        assert unmoved is not conditional, f"the label in G with conditional={conditional}"
    assert G.decoder.embed.num_embeddings == 1

def plain_ssim(x, y):
    """SSIM as a convolution with the 11 x 11 window, on [0, 1]."""
    offset = torch.arange(-5.0, 6.0)
    window = torch.exp(-(offset[:, None]**2 + offset**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 11, 11)
    blur = lambda t: F.conv2d(t, window, groups=t.shape[1])
    x, y = x / 2 + 0.5, y / 2 + 0.5
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    return ((2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
            / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))).mean()

# 2 l1, 3 l2, 5 SSIM are the authors' weights; half of each adversarial term, image and pixels
WEIGHTS = dict(adv=0.5, l1=2, l2=3, ssim=5)

def iterate(G, D, opt_g, opt_d, x, x_m, y, kl_weight):
    """train_gen.train_step with its arguments of today -> {name: loss}."""
    settings = argparse.Namespace(**WEIGHTS, kl=kl_weight, bf16=False)
    return train_gen.train_step(G, D, opt_g, opt_d, x, x_m, y, settings)

def plain_iteration(G, D, x, x_m, y, kl_weight, rate_g, rate_d):
    """Algorithm 1, lines 2 to 5, by hand, with gradient descent -> losses, gradients of G and D."""
    says = lambda t, real: F.binary_cross_entropy_with_logits(t, torch.full_like(t, real))
    mu, logvar = G.encoder(x_m)
    sigma = torch.exp(0.5 * logvar)
    label = y if G.settings["conditional"] else torch.zeros_like(y)
    x_fake = G.decoder(mu + sigma * torch.randn_like(mu), label)
    logit, pixels = D(x_fake, y)
    loss_g = (WEIGHTS["adv"] * (says(logit, 1.0) + says(pixels, 1.0))                  # Eq. 6
              + WEIGHTS["l1"] * (x_fake - x).abs().mean()
              + WEIGHTS["l2"] * (x_fake - x).pow(2).mean()
              + WEIGHTS["ssim"] * (1 - plain_ssim(x_fake, x)))
    unit = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mu, sigma), unit)
    kl = kl.sum(1).mean()                                                              # Eq. 1
    grads_g = torch.autograd.grad(loss_g + kl_weight * kl, list(G.parameters()))
    descend(G, grads_g, rate_g)
    (real, real_px), (fake, fake_px) = D(x, y), D(x_fake.detach(), y)
    loss_d = (says(real, 1.0) + says(fake, 0.0)                                        # Eq. 4
              + says(real_px, 1.0) + says(fake_px, 0.0))                               # Eq. 5
    grads_d = torch.autograd.grad(loss_d, list(D.parameters()))
    descend(D, grads_d, rate_d)
    return dict(loss_g=loss_g, kl=kl, loss_d=loss_d), grads_g, grads_d

@torch.no_grad()
def descend(net, grads, rate):
    for p, grad in zip(net.parameters(), grads):
        p -= rate * grad

def left_from_before(net):
    """Gradients of an earlier step, which must not count in this one."""
    for p in net.parameters():
        p.grad = torch.ones_like(p)

def close(ours, theirs, tolerance=1e-3):  # float32; the order of sums differs
    ours, theirs = (torch.as_tensor(t).detach() for t in (ours, theirs))
    return (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-5

def agree(name, net, start, plain, grads):
    """Gradients and updated weights of `net` are those of the plain version, and weights moved."""
    moved = [(p != old).any() for p, old in zip(net.parameters(), start.parameters())]
    assert sum(moved) > len(moved) / 2, f"{name} is not updated"
    own = zip(net.named_parameters(), plain.parameters(), start.parameters(), grads)
    for (key, ours), theirs, old, grad in own:
        assert ours.grad is not None, f"{name}'s {key} gets no gradient"
        assert close(ours.grad, grad), f"the gradient of {name}'s {key}"
        assert close(ours - old, theirs - old), f"{name}'s {key} after the update"

@pytest.mark.parametrize("conditional", [True, False])
def test_an_iteration_of_algorithm_1_against_a_plain_one(conditional):
    """Losses, gradients and updated weights of E, D and D^Unet, for one draw of z."""
    torch.manual_seed(0)
    nets = Generator(3, 2, 16, 1, conditional=conditional), UNetDiscriminator(3, 2, 1)
    nets[0].encoder.logvar.bias.data += 1  # Sigma unlike its square
    (G, D), plain = deepcopy(nets), deepcopy(nets)
    x, y = images(7), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    x_m = random_mask(x)[0]
    for net in (G, D):
        left_from_before(net)
    opts = torch.optim.SGD(G.parameters(), 0.2), torch.optim.SGD(D.parameters(), 0.3)
    torch.manual_seed(1)
    losses = iterate(G, D, *opts, x, x_m, y, 0.25)
    torch.manual_seed(1)
    expected, grads_g, grads_d = plain_iteration(*plain, x, x_m, y, 0.25, 0.2, 0.3)
    for name, value in expected.items():
        assert close(losses[name], value, 1e-5), f"{name}: {losses[name]:.5f} for {value:.5f}"
    agree("G", G, nets[0], plain[0], grads_g)
    agree("D^Unet", D, nets[1], plain[1], grads_d)
    assert min(float(v.detach()) for v in expected.values()) > 0.1  # each of them counts

def judge(G, scorer, opt, x, x_m, y, right):
    """train_scorer.train_step with its arguments of today -> loss."""
    pairs = [[t[rows] for t in (x, x_m, y)] for rows in (right, ~right)]
    return train_scorer.train_step(scorer, G, opt, *pairs)["loss"]

def test_a_step_of_figure_3_against_a_plain_one():
    """Eq. 2's loss, gradients and updated weights of C_b; G makes x' under the label and rests."""
    torch.manual_seed(0)
    G, C_b = Generator(3, 2, 16, 1).eval(), BinaryScorer(3, 2, 1)
    G.encoder.mu.weight.data *= 100  # a fresh encoder says next to nothing about x_m
    frozen, before, plain = deepcopy(G), deepcopy(C_b), deepcopy(C_b)
    x, y = images(8), torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])
    x_m, right = random_mask(x)[0], torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).bool()
    left_from_before(C_b)
    loss = judge(G, C_b, torch.optim.SGD(C_b.parameters(), 0.2), x, x_m, y, right)
    with torch.no_grad():
        x_fake = frozen.decoder(frozen.encoder(x_m)[0], y)
    score = plain(x, x_fake, y)
    hinges = [(1 - s if r else 1 + s).clamp(min=0) for s, r in zip(score, right)]
    expected = sum(hinges[i] / right.sum() if r else hinges[i] / (~right).sum()
                   for i, r in enumerate(right))
    grads = torch.autograd.grad(expected, list(plain.parameters()))
    descend(plain, grads, 0.2)
    assert close(loss, expected, 1e-5), f"Eq. 2: {loss:.5f} for {expected:.5f}"
    agree("C_b", C_b, before, plain, grads)
    assert same(dict(G.state_dict()), dict(frozen.state_dict())), "G was trained with C_b"
    assert all(p.grad is None for p in G.parameters()), "G got gradients"

@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: open("/no/route"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))

def test_ssim_lpips_and_dists_check_values(tmp_path, monkeypatch):
    """With a seeded VGG16 and uniform DISTS weights: the real loading code, offline."""
    from torchvision.models import vgg16
    folder, small, r = tmp_path / "hub" / "checkpoints", images(2), np.random.default_rng(0)
    x = r.random((2, 3, 32, 32))
    y = np.clip(x + 0.1 * r.standard_normal((2, 3, 32, 32)), 0, 1)
    x, y = (torch.from_numpy(a * 2 - 1).float() for a in (x, y))
    r, state = np.random.default_rng(1234), {}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16().state_dict().items()}
    for name, shape in shapes.items():
        state[name] = torch.zeros(1).expand(shape)  # small on disk
        if name.startswith("features"):
            scale = np.sqrt(2 / np.prod(shape[1:])) if name.endswith("weight") else 0.01
            state[name] = torch.from_numpy(r.standard_normal(shape) * scale).float()
    assert abs(state["features.0.weight"].sum() - 9.726634) < 1e-4
    folder.mkdir(parents=True)
    torch.save(state, folder / moodcat.WEIGHT_FILES["vgg"])
    learned = dict(alpha=torch.ones(1, 1475, 1, 1), beta=torch.ones(1, 1475, 1, 1))
    torch.save(learned, folder / moodcat.WEIGHT_FILES["dists"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, values in (("lpips", [0.0175501, 0.0167098]), ("dists", [0.0175726, 0.0155438]),
                         ("ssim", [-0.9440343, -0.9469012])):  # as scorers: the sign turned
        scorer = moodcat.SCORERS[name](None, None)
        assert torch.allclose(-scorer(x, y, None), torch.tensor(values), atol=2e-6), name
        equal, other = scorer(small, small, None), scorer(small, -small, None)
        assert (equal - float(name == "ssim")).abs().max() < 1e-5 and (equal > other + 0.01).all()

def test_lpips_with_a_pretrained_squeezenet():
    if not Path(torch.hub.get_dir(), "checkpoints", moodcat.WEIGHT_FILES["squeeze"]).exists():
        pytest.skip("no SqueezeNet weights: evaluate.py --scorers lpips-squeeze downloads them")
    x, metric = images(2, 3, 32), LPIPS("squeeze")
    blurred = F.avg_pool2d(x, 5, 1, 2)
    assert (metric(x, x + 0.02 * (blurred - x)) < metric(x, blurred)).all()
    assert metric(x, x).abs().max() < 1e-6

def test_missing_or_damaged_weights_end_in_one_line(offline, tmp_path):
    file = tmp_path / "nothing" / "hub" / "checkpoints" / moodcat.WEIGHT_FILES["vgg"]
    for content in (b"", b"half a file"):
        for metric in (LPIPS, DISTS):
            with pytest.raises(OSError, match=f"{file.name}.*--scorers cb ssim"):
                metric()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

def test_p_values_by_hand_and_by_count():
    held = torch.tensor([3.0, 1.0, 2.0])  # 1, 2, 3 of 4
    inside = log_p_values(torch.tensor([1.0, 1.5, 2.0, 2.25, 3.0, 9.0]), held).exp().tolist()
    assert inside == pytest.approx([0.25, 0.375, 0.5, 0.5625, 0.75, 0.75])
    below = log_p_values(torch.tensor([0.0, -1.0]), held)  # by e for a standard deviation, 1
    assert below.exp().tolist() == pytest.approx([0.25 / np.e, 0.25 / np.e**2])
    scores = dict(a=torch.tensor([1.5, 2.0]), b=torch.tensor([1.0, 3.0]))
    joint = joint_scores(scores, dict(a=held, b=held))
    assert joint["min-p"].exp().tolist() == pytest.approx([0.25, 0.5])
    assert joint["fisher"].exp().tolist() == pytest.approx([0.375 * 0.25, 0.5 * 0.75])
    held, s = torch.randn(99), torch.randn(500)
    p, count = log_p_values(s, held).exp() * 100, (held <= s[:, None]).sum(1).double()
    low, high = count, (count + 1).clamp(max=99)
    assert ((p > low - 1e-9) & (p < high + 1e-9)).all()
    for held in (torch.randn(50) * 3, torch.full((20,), 2.0)):  # finite, and falling, far below
        s = held.min() - torch.logspace(-3, 5, 60, dtype=torch.double)
        log_p = log_p_values(s, held)
        assert (log_p.diff() < 0).all() and log_p.max() < 0 and log_p.isfinite().all()

def test_a_score_that_is_not_finite_rejects():
    """issue: NaN passes no comparison, so it must never mean in-distribution."""
    held, detector = {"a": torch.randn(40), "b": torch.randn(40)}, tiny_detector()
    fixed = detector.calibration = fit_calibration(held)
    for bad in (float("nan"), float("inf"), -float("inf")):
        scores = {"a": torch.tensor([bad, 9.0]), "b": torch.tensor([9.0, 9.0])}
        joint = joint_scores(scores, fixed["held_out"])
        for detector.rule in moodcat.RULES:
            assert joint[detector.rule].isnan().tolist() == [True, False]
            assert detector.rejects(joint).tolist() == [True, False], bad
        with pytest.raises(ValueError, match="not finite"):
            fit_calibration(dict(held, b=torch.cat([held["b"][1:], torch.tensor([bad])])))
    detector, x, y = tiny_detector(), images(60), torch.arange(60) % 3
    assert not detector.calibrate(x, y).is_ood(x, y).all()
    detector.scorers["cb"].head.linear.bias.data.fill_(float("nan"))
    assert detector.is_ood(x, y).all()

def test_a_rule_may_be_one_scorer_alone(tmp_path):
    """Its threshold is that of the odd held-out images' own scores; nothing else is asked."""
    x, y = images(80), torch.arange(80) % 3
    logits = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).requires_grad_(False)
    scorers = {"cb": BinaryScorer(3, 2, 1), "energy": moodcat.SCORERS["energy"](None, logits)}
    detector = tiny_detector(scorers, rule="energy").calibrate(x, y, 0.9)
    energy = logits(x).logsumexp(1)
    threshold = energy[1::2].sort(descending=True).values[36]  # the 37th of 40: 37 / 41 >= 0.9
    assert torch.equal(detector.is_ood(x, y), energy < threshold) and 0 < (energy < threshold).sum() < 20
    detector.save(tmp_path / "d.pt")
    assert MoodCat.load(tmp_path / "d.pt", classifier=logits).rule == "energy"
    with pytest.raises(ValueError, match="a rule"):
        tiny_detector({"cb": scorers["cb"]}, rule="energy")

@pytest.mark.parametrize("scorers", [2, 3])
@pytest.mark.parametrize("n", [40, 80, 180])
def test_the_promised_tpr_holds_for_several_scorers(n, scorers):
    """issue: three scorers and 40 images must not accept 87.5% where 95% are promised."""
    r, accepted = np.random.default_rng(n + scorers), {rule: [] for rule in moodcat.RULES}
    for _ in range(400):
        z = r.standard_normal((n + 100, scorers)) @ r.standard_normal((scorers, scorers))
        s = {str(k): torch.from_numpy(np.exp(z[:, k])).float() for k in range(scorers)}
        fixed = fit_calibration({k: v[:n] for k, v in s.items()}, 0.95)
        fresh = {k: v[n:] for k, v in s.items()}
        for rule, joint in joint_scores(fresh, fixed["held_out"]).items():
            accepted[rule].append((joint >= fixed["threshold"][rule]).double().mean().item())
        alone = fresh["0"] >= fixed["threshold"]["0"]
        accepted.setdefault("0", []).append(alone.double().mean().item())
    k = np.ceil(0.95 * (n // 2 + 1))
    for rule, shares in accepted.items():
        error = 3 * np.std(shares) / 400**0.5
        assert 0.95 - error <= np.mean(shares), rule
        assert abs(np.mean(shares) - k / (n // 2 + 1)) <= error, rule  # that of exchangeable scores
    with pytest.raises(ValueError, match="TPR"):
        fit_calibration({name: v[:38] for name, v in s.items()}, 0.96)

def test_scores_do_not_depend_on_batch_or_order():
    x, y, order = images(70), torch.arange(70) % 3, torch.randperm(70)
    detector = tiny_detector(masks=2).calibrate(x, y)
    whole = detector.score(x, y)
    assert list(whole) == ["cb", "ssim", "min-p", "fisher"]
    for rows in (order, [0], [33], [69]):
        for name, value in detector.score(x[rows], y[rows]).items():
            assert torch.allclose(value, whole[name][rows], atol=1e-4), name
    ood = whole[detector.rule] < detector.calibration["threshold"][detector.rule]
    assert torch.equal(detector.is_ood(x, y), ood) and ood.any()
    with torch.no_grad():  # masks are averaged
        first, second = (detector.mismatch(x, y, i)[0] for i in (0, 1))
    for name in first:
        assert torch.allclose(whole[name], (first[name] + second[name]) / 2, atol=1e-5)
        assert not torch.allclose(first[name], second[name], atol=1e-6)

def test_folding_changes_nothing():
    torch.manual_seed(0)
    G, C_b, x, y = Generator(5, 8, 16), BinaryScorer(5, 8), images(70, 3), torch.arange(70) % 5
    for _ in range(5):  # statistics unlike those of a fresh net
        C_b(x, G(2 * x + 0.5, y)[0], y)
    assert sum("parametrizations" in k for net in (G, C_b) for k in net.state_dict()) > 60
    with torch.no_grad():
        x_fake, mu, _ = G.eval()(ImageMask()(x)[0], y)
        score, detector = C_b.eval()(x, x_fake, y), MoodCat(G, {"cb": C_b})
        seen, _, x_fake_folded = detector.mismatch(x, y)
    assert torch.allclose(x_fake_folded, x_fake, atol=1e-5)
    for ours in (seen["cb"], detector.score(x, y)["cb"]):  # score() in chunks
        assert torch.allclose(ours, score, atol=1e-5, rtol=1e-4)
    assert not any("parametrizations" in k for net in (G, C_b) for k in net.state_dict())

def test_bad_tensors_and_detectors_are_refused():
    detector, x, y = tiny_detector(), images(2), [0, 1]
    for bad_x, bad_y, words in (
            (x * 127.5 + 127.5, y, "lie in"), (x / 0, y, "finite"), (x.byte(), y, "float"),
            (x[:, :, :8], y, "takes"), (x.repeat(1, 3, 1, 1), y, "takes"), (x[:0], [], "takes"),
            (x, [0, 3], "0 to 2"), (x, [-1, 0], "0 to 2"), (x, [0.0, 1.0], "integers"),
            (x, [0], "shape")):
        with pytest.raises(ValueError, match=words):
            detector.score(bad_x, torch.tensor(bad_y))
    with pytest.raises(ValueError, match="calibrate"):
        detector.is_ood(x, y)
    for bad in (dict(scorers={"cb": BinaryScorer(4, 2, 1)}), dict(scorers={}), dict(rule="best")):
        with pytest.raises(ValueError):
            MoodCat(**{"generator": detector.generator, "scorers": detector.scorers, **bad})

def test_save_and_load_give_the_same_scores_bit_for_bit(tmp_path):
    x, y, mask, path = images(60), torch.arange(60) % 3, ImageMask((0.2, 0.4), 7), tmp_path / "d.pt"
    logits = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).requires_grad_(False)
    scorers = {"cb": BinaryScorer(3, 2, 1), "energy": moodcat.SCORERS["energy"](None, logits)}
    detector = tiny_detector(scorers, mask=mask, masks=2, rule="min-p")
    detector.calibrate(x, y, 0.9, note="a").save(path)
    loaded = MoodCat.load(path, classifier=logits)
    assert same(detector.score(x, y), loaded.score(x, y)) and loaded.rule == "min-p"
    assert torch.equal(detector.is_ood(x, y), loaded.is_ood(x, y)) and detector.is_ood(x, y).any()
    assert loaded.calibration["notes"] == dict(note="a") and loaded.mask.settings == mask.settings
    with pytest.raises(ValueError, match="needs the classifier"):
        MoodCat.load(path)

def test_a_scorer_and_a_mask_of_a_fork(tmp_path, monkeypatch):
    """One function and one row of SCORERS; a mask f(x, i), given again to load(), by its name."""
    l1 = lambda x, x_fake, y: -(x - x_fake).abs().mean((1, 2, 3))
    def half(x, i):
        return random_mask(x, 0.5, torch.Generator().manual_seed(i))
    x, y, path = images(30), torch.arange(30) % 3, tmp_path / "detector.pt"
    detector = tiny_detector({"cb": BinaryScorer(3, 2, 1), "l1": l1}, mask=half, masks=2)
    with pytest.raises(ValueError, match="'l1'"):
        detector.calibrate(x, y, 0.9).save(path)
    with monkeypatch.context() as fork:
        fork.setitem(moodcat.SCORERS, "l1", lambda settings, classifier: l1)
        detector.save(path)
        assert same(detector.score(x, y), MoodCat.load(path, mask=half).score(x, y))
        for other in (None, ImageMask()):  # issue: another mask was taken without a word
            with pytest.raises(ValueError, match="saved with the mask half"):
                MoodCat.load(path, mask=other)
        tiny_detector().calibrate(x, y, 0.9).save(path)
        with pytest.raises(ValueError, match="saved with the mask ImageMask"):
            MoodCat.load(path, mask=half)
        detector.save(path)
    with pytest.raises(ValueError, match="l1"):
        MoodCat.load(path, mask=half)

def test_a_mask_of_a_fork_is_one_row_for_training_and_test(tmp_path, monkeypatch):
    def left(u, H, W, low, high):
        mask = torch.zeros(len(u), 1, H, W, dtype=torch.bool)
        mask[..., :5] = True
        return mask
    monkeypatch.setitem(moodcat.MASKS, "left", left)
    gen, sco = short(tmp_path, "--seed", 1)
    masked, plain = [], random_mask
    def watched(*a, **k):
        masked.append(plain(*a, **k)[1])
        return plain(*a, **k)
    for module in (train_gen, train_scorer, moodcat):
        monkeypatch.setattr(module, "random_mask", watched)
    start(*gen, "--mask", "left")
    start(*sco)
    start(evaluate.main, "--run", tmp_path, "--scorers", "cb")
    assert all((m.sum((1, 2, 3)) == 5 * 16).all() and m[..., :5].all() for m in masked)
    assert len(masked) > 6 + 6 and load(tmp_path, "scorer")["settings"]["mask"] == "left"
    classifier, _, _ = train_scorer.load_classifier(tmp_path, None, "cpu")
    assert MoodCat.load(tmp_path / "detector.pt").mask.settings["style"] == "left"
    monkeypatch.delitem(moodcat.MASKS, "left")  # another script, where it is not
    for main in (train_gen.main, train_scorer.main, evaluate.main):
        line = complaint(main, "--run", tmp_path, *["--steps", 9, "--resume"] * (main == train_gen.main))
        assert "no mask 'left' in moodcat.MASKS" in line

def test_a_second_trained_scorer_is_one_class_and_one_row(tmp_path, monkeypatch):
    class Other(BinaryScorer):
        def __init__(self, *sizes, depth=2, **more):
            super().__init__(*sizes, **more)
            self.settings = dict(self.settings, depth=depth)  # a setting that the generator has not
        def forward(self, x, x_fake, y):
            return super().forward(x_fake, x, y)
    row = moodcat.Trained(Other, "other", "train_scorer.py --scorer other")
    monkeypatch.setitem(moodcat.SCORERS, "other", row)
    gen, sco = short(tmp_path)
    start(*gen)
    start(*sco, "--scorer", "other")
    start(evaluate.main, "--run", tmp_path, "--scorers", "other", "ssim")
    assert "other" in results(tmp_path)["y = C(x)"] and load(tmp_path, "other")["step"] == 6
    assert isinstance(MoodCat.load(tmp_path / "detector.pt").scorers["other"], Other)
    for wrong in (Other(6, 2, 3), Other(5, 2, 1)):
        with pytest.raises(ValueError, match="other classes or channels"):
            MoodCat(Generator(6, 2, 16, 1), {"other": wrong})
    assert "invalid choice: 'cb_extra'" in complaint(*sco, "--scorer", "cb_extra")  # images train it
    assert "leave out --scorer" in complaint(*sco, "--scorer", "other", "--extra", tmp_path)

def test_a_net_that_does_not_fit_its_checkpoint_ends_in_one_line(whole, tmp_path, monkeypatch):
    """A fork that changed a layer, and an old run."""
    shutil.copytree(whole, tmp_path / "run")
    class Deeper(Encoder):
        def __init__(self, *a):
            super().__init__(*a)
            self.more = torch.nn.Linear(2, 2)
    monkeypatch.setattr(moodcat, "Encoder", Deeper)
    for main, more in ((train_gen.main, ["--steps", 7, "--resume"]), (train_scorer.main, []),
                       (evaluate.main, [])):
        line = complaint(main, "--run", tmp_path / "run", *more)
        assert "generator.pt does not fit" in line and "more.weight" in line

def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    path, fine = tmp_path / "a.pt", dict(kind="generator", weights=torch.ones(1000))
    with pytest.raises(OSError, match="does not exist"):
        load_checkpoint(path, "generator")
    save_checkpoint(path, fine)
    with pytest.raises(ValueError, match="generator.*not a scorer"):
        load_checkpoint(path, "scorer")
    for content in (b"", b"no checkpoint", path.read_bytes()[:2000], b"PK\x03\x04" + b"0" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(path, "generator")
    for foreign, words in (([1], "no checkpoint"), (fine, "no checkpoint"),
                           (dict(fine, format="moodcat 2"), "moodcat 2.*not a generator of this")):
        torch.save(foreign, path)
        with pytest.raises(ValueError, match=words):
            load_checkpoint(path, "generator")

def test_flipped_bits_are_noticed(tmp_path):
    """issue: 58 of 60 damaged detectors used to load with other weights."""
    path, r, refused = tmp_path / "detector.pt", np.random.default_rng(0), 0
    detector, x, y = tiny_detector(), images(60), [0, 1] * 30
    detector.calibrate(x, y)
    detector.save(path)
    whole, scores = path.read_bytes(), detector.score(x, y)
    for _ in range(60):
        damaged = bytearray(whole)
        for at in r.integers(0, len(whole), 3):
            damaged[at] ^= 1 << r.integers(8)
        path.write_bytes(damaged)
        try:
            assert same(MoodCat.load(path).score(x, y), scores)  # the zip's padding may change
        except ValueError as error:
            refused += "damaged" in str(error)
    assert refused > 50

def test_nothing_in_a_run_folder_is_executed(tmp_path, monkeypatch):
    """issue: a program in a downloaded run folder used to be executed."""
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("executed"))
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "classifier.pt"))
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        train_scorer.load_classifier(tmp_path, None, "cpu")

def test_odd_detectors_end_in_one_line_before_anything_is_allocated(tmp_path):
    """issue: num_classes of a billion, an unknown scorer, missing keys, weights None."""
    path = tmp_path / "detector.pt"
    tiny_detector().calibrate(images(60), torch.arange(60) % 3).save(path)
    good = load_checkpoint(path, "detector")
    of = lambda what, **changes: {what: {**good[what], **changes}}
    sized = lambda net, **sizes: of("settings", **{net: {**good["settings"][net], **sizes}})
    odd = [sized("generator", num_classes=n) for n in (10**9, -1, "6", None, True)]
    odd += [sized("cb", ch=10**9), sized("generator", image_size=30), sized("cb", channels=2)]
    odd += [of("weights", **{name: None}) for name in ("generator", "cb")]
    odd += [of("weights", cb={}), dict(weights=None), dict(settings={}), dict(rule="best")]
    odd += [dict(scorers=["psnr"]), dict(scorers=[]), dict(mask=("ImageMask", dict(blob=1)))]
    odd += [dict(mask=None)]
    odd = [{**good, **changes} for changes in odd]
    needed = good.keys() - {"format"}
    odd += [{k: v for k, v in good.items() if k != key} for key in needed]
    for content in odd:
        save_checkpoint(path, content)
        with pytest.raises(ValueError, match="detector.pt"):
            MoodCat.load(path)

def test_ood_metrics_check_values():
    r = np.random.default_rng(0)
    drawn = r.normal(1, 1, 20).round(2), r.normal(0, 1, 20).round(2)
    few = [.9, .8, .7, .6, .4], [.75, .5, .3, .2, .1]
    for sides, expected in ((few, (.2, .84, .834762, .874643)),
                            (drawn, (.7, .758750, .767914, .686554)), (([1] * 9, [1] * 4), (1, .5)),
                            ((np.arange(10, 20) * 1e-30, np.arange(10) * 1e-30), (0, 1, 1, 1))):
        values = list(ood_metrics(*sides).values())  # FPR, AUROC, AUPR-In, AUPR-Out
        assert values[:len(expected)] == pytest.approx(expected, abs=1e-6)
    for bad in (([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [np.inf])):
        with pytest.raises(ValueError):
            ood_metrics(*bad)

def test_odin_by_hand():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).double()
    x, w = ((images(5) + 1) * 127.5).round().byte(), linear[1].weight
    images_of = to_float(x).double()
    classifier = lambda x: linear(x.double())
    logits = classifier(images_of).detach()
    top = logits.argmax(1)
    grad = (w[top] - (logits / 1000).softmax(1) @ w).view_as(images_of)  # of T log p_top, by hand
    moved = classifier(to_float(x) + 0.0028 * grad.sign().float()) / 1000
    got = evaluate.odin(classifier, x)["ODIN"]
    assert torch.allclose(got, moved.softmax(1).max(1).values, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert not evaluate.odin(lambda x: classifier(x).detach(), x)  # no gradient, no ODIN

def test_a_table_by_hand():
    """Images of known classes inside an OOD set count as in-distribution, under their labels."""
    def scored(truth, y, predicted, given):
        kinds = {"C(x)": (y, predicted), "given": (truth, given)}
        return {kind: evaluate.Scored(torch.tensor(truth), torch.tensor(labels),
                                      {"cb": torch.tensor(values)})
                for kind, (labels, values) in kinds.items()}
    sets = {
        "in-distribution": scored([0, 1, 1], [0, 1, 0], [5.0, 4.0, 1.0], [5.0, 4.0, 3.5]),
        "mixed": scored([1, 0, -1, -1], [1, 1, 0, 0], [3.0, 2.0, 0.0, 2.5], [2.2, 3.2, 0.0, 3.3]),
        "pure": scored([-1] * 3, [0] * 3, [0.5, 6.0, 7.0], [0.5, 6.0, 7.0])}
    sets = {(name, kind): s for name, kinds in sets.items() for kind, s in kinds.items()}
    # 5 4 3 2 1 against 2.5 0: 5 + 3 of 10 pairs; 5 4 1 against 7 6 0.5: 3 of 9. The thresholds of
    # FPR, k = floor(0.95 n): the 4th of 5, 2, and the 2nd of 3, 4
    rows = evaluate.tabulate(sets, *evaluate.PROTOCOLS["y = C(x)"])["cb"]
    for name, expected in (("mixed", (0.5, 0.8, 3 / 5)), ("pure", (2 / 3, 3 / 9, 2 / 3))):
        assert [rows[name][c] for c in ("fpr95", "auroc", "accuracy")] == pytest.approx(expected)
    # 5 4 3.5 3.2 2.2 against the random 3.3 0 and the predicted 2.5 0
    for protocol, pairs in (("oracle labels", 8), ("true in-distribution", 9)):
        row = evaluate.tabulate(sets, *evaluate.PROTOCOLS[protocol])["cb"]["mixed"]
        assert row["auroc"] == pytest.approx(pairs / 10), protocol

def write_images(folder, n, low=0, size=(16, 16)):  # n images, pixels from low to low + 79
    r = np.random.default_rng([n, low])
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = r.integers(low, low + 80, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder

CLASSES = ["$x_{$", "1", "=1+1"]  # dark, middling, light

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Colour classes with odd names and images of every mode, and a folder of OOD images."""
    root = tmp_path_factory.mktemp("images")
    for split, n in (("train", 60), ("test", 12)):
        for c, name in enumerate(CLASSES):
            own = write_images(root / split / name, n, 80 * c, (20, 16))
            for i, file in enumerate(sorted(own.iterdir())):
                Image.open(file).convert(("RGB", "L", "RGBA", "P")[i % 4]).save(file)
    write_images(root / "ood" / os.fsdecode(b"=not utf-8 \xff"), 8)
    write_images(root / "train" / "1" / ".ipynb_checkpoints", 3)
    return root

def test_images_of_every_mode_come_out_alike(folder, tmp_path):
    split = Split(str(folder), "train", size=16)
    assert split.x.shape == (180, 3, 16, 16) and split.x.dtype == torch.uint8
    for c in range(3):
        means = split.x[split.y == c].float().mean((1, 2, 3))
        assert abs(means - 80 * c - 39.5).max() < 20, CLASSES[c]
    for name, pixels in (("wide", np.uint16), ("float", np.float32)):  # of no certain range
        Image.fromarray(np.zeros((16, 16), pixels)).save(tmp_path / f"{name}.tiff")
    (tmp_path / "damaged.png").write_bytes(b"half an image")
    for file, words in (("wide.tiff", "8 bits"), ("float.tiff", "8 bits"), ("damaged.png", "")):
        with pytest.raises(OSError, match=f"{file} cannot be read.*{words}"):
            read_images([str(tmp_path / file)], 3, 16)

def test_held_out_images_are_chosen_by_their_pixels():
    """issue: one more image used to put hundreds of trained images into the held-out set."""
    held, seeded = train_gen.choose_held_out, torch.Generator().manual_seed(0)
    hashes = torch.randint(-2**62, 2**62, (5110,), generator=seeded)
    zeros = torch.zeros_like(hashes)
    before, order = held(hashes[:5009], zeros[:5009]), torch.randperm(5009)
    for new in hashes[5009:]:
        after = held(torch.cat([hashes[:5009], new[None]]), zeros[:5010])[:-1]
        assert (after & ~before).sum() <= 1 and (before & ~after).sum() <= 1
    assert before.sum() == 500 and torch.equal(held(hashes[order], zeros[:5009]), before[order])
    twice = held(hashes.repeat(2), zeros.repeat(2)).view(2, -1)
    assert torch.equal(twice[0], twice[1])  # duplicates stay together
    y = (torch.arange(110) < 70).long()
    assert [int(held(hashes[:110], y)[y == c].sum()) for c in (0, 1)] == [20, 30]

def test_mismatched_labels_are_never_right_and_equally_likely():
    y = torch.arange(5).repeat(20_000)
    pairs = (5 * y + train_scorer.mismatched(y, 5)).bincount(minlength=25).view(5, 5)
    assert (pairs.diagonal() == 0).all()
    assert ((pairs[~torch.eye(5, dtype=torch.bool)] / 5000 - 1).abs() < 0.08).all()

@pytest.mark.parametrize("mirror", [True, False])
def test_augment_shifts_and_mirrors_only_where_asked(mirror):
    x, seen = images(150, 3, 32), set()
    for image, crop in zip(x, train_scorer.augment(x, mirror)):
        padded = F.pad(image[None], (4,) * 4, mode="reflect")[0]
        seen |= {(i, j, side) for i in range(9) for j in range(9) for side in (0, 1)
                 if torch.equal((padded, padded.flip(2))[side][:, i:i + 32, j:j + 32], crop)}
    assert len(seen) > 55 and {s[2] for s in seen} == ({0, 1} if mirror else {0})

def listing(folder):
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*")}

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short real training on the digits: all three scripts. They write into their run alone."""
    run, before = tmp_path_factory.mktemp("runs") / "digits", listing(HERE / "results")
    start(train_gen.main, "--run", run, "--ch", 4, "--steps", 80)
    start(train_scorer.main, "--run", run, "--steps", 100, "--classifier-steps", 60)
    start(evaluate.main, "--run", run)
    assert listing(HERE / "results") == before  # issue: results of the checkout were replaced
    return run

@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")

def results(run):
    return json.loads(Path(run, "results.json").read_text())

def table(run):
    with open(Path(run, "scores.csv"), errors="surrogateescape") as file:
        return list(csv.DictReader(file))

def column(rows, name, which, labels="C(x)"):
    picked = [r for r in rows if (r["set"], r["labels"]) == (which, labels)]
    return torch.tensor([float(r[name]) for r in picked])

def test_trainings_learn_and_evaluate_writes_numbers_that_agree(run):
    lines = [json.loads(ln) for ln in (run / "generator.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_g"] < 0.8 * lines[0]["loss_g"] and len(lines) == 8
    assert load(run, "scorer")["values"]["val_auroc"] > 0.7
    shown, rows, sets = results(run), table(run), ("in-distribution", "unknown")
    assert shown["n"] == {k: len(column(rows, "cb", k)) for k in sets}
    assert shown["n"]["unknown"] == 238 and len(column(rows, "cb", "held-out")) == 180
    methods = {"MSP", "energy", "ODIN", "cb", "ssim", "min-p", "fisher", "min-p with energy",
               "fisher with energy"}
    for protocol, labels in {"y = C(x)": ("C(x)", "C(x)"), "oracle labels": ("given", "given"),
                             "true in-distribution": ("given", "C(x)")}.items():
        assert set(shown[protocol]) == methods
        for method in methods:
            again = ood_metrics(*(column(rows, method, *pair) for pair in zip(sets, labels)))
            row = shown[protocol][method]["unknown"]
            assert all(abs(row[k] - again[k]) < 1e-9 for k in again), (protocol, method)
    held = {k: column(rows, k, "held-out") for k in ("cb", "ssim", "energy")}
    unknown = {k: column(rows, k, "unknown") for k in held}
    for rule, joint in joint_scores(unknown, fit_calibration(held)["held_out"]).items():
        assert torch.allclose(column(rows, f"{rule} with energy", "unknown"), joint, atol=1e-4)
    threshold = load(run, "detector")["calibration"]["threshold"]["fisher"]
    for name, share in shown["flagged"].items():
        ood = column(rows, "fisher with energy", name) < threshold
        assert ood.double().mean() == pytest.approx(share)

def test_photographs_are_judged_by_energy_where_no_rule_is_named(run, tmp_path):
    names = ["cb", "ssim", "energy"]
    assert evaluate.default_rule("digits", names) == "fisher"
    assert evaluate.default_rule("FOLDER", names) == evaluate.default_rule("cifar10", names) == "energy"
    assert evaluate.default_rule("FOLDER", names[:2]) == "fisher"
    evaluate.main(["--run", str(run), "--rule", "energy", "--out", str(tmp_path)])
    shown, rows = results(tmp_path), table(tmp_path)
    assert shown["rule"] == "energy" and shown["y = C(x)"] == results(run)["y = C(x)"]
    threshold = load(tmp_path, "detector")["calibration"]["threshold"]["energy"]
    for name, share in shown["flagged"].items():
        ood = column(rows, "energy", name) < threshold
        assert ood.double().mean() == pytest.approx(share, abs=1e-6)

# --- Figure 2 and what evaluate.py scores --------------------------------------------------------
def test_the_detector_masks_then_synthesises_under_y_then_compares(monkeypatch):
    """Figure 2: f(x, x', y), where x' = G(x_m, y) and x is the whole image."""
    seen, x, y = [], images(5), torch.tensor([0, 1, 2, 2, 0])
    mask = lambda x, i: random_mask(x, 0.3, torch.Generator().manual_seed(i))
    scorer = lambda *inputs: seen.append(inputs) or inputs[2].float()
    detector = tiny_detector({"seen": scorer}, mask=mask, masks=2)
    assert torch.equal(detector.score(x, y)["seen"], y.float()), "not the mean over the masks"
    assert len(seen) == 2
    for i, (given, x_fake, label) in enumerate(seen):
        assert torch.equal(given, x), "a scorer gets another x"
        assert torch.equal(label, y), "a scorer gets another label"
        z = detector.generator.encoder(mask(x, i)[0])[0]
        assert torch.allclose(x_fake, detector.generator.decoder(z, y), atol=1e-6), f"x', mask {i}"
        assert not torch.allclose(x_fake, detector.generator(x, y)[0], atol=1e-6)

def test_every_shipped_scorer_is_higher_for_a_better_synthesis(monkeypatch):
    """Distances with the sign turned, energy as logsumexp; of the nets that the names say."""
    made = []
    class Distance(torch.nn.Module):
        def __init__(self, net="dists"):
            super().__init__()
            made.append(net)
        def forward(self, x, x_fake):
            return (x - x_fake).abs().mean((1, 2, 3))
    for name in ("LPIPS", "DISTS"):
        monkeypatch.setattr(moodcat, name, Distance)
    x, x_fake, y = images(4), images(4, seed=1), torch.tensor([0, 1, 2, 0])
    names = {"lpips": "vgg", "lpips-squeeze": "squeeze", "dists": "dists"}
    for name, net in names.items():
        got = moodcat.SCORERS[name](None, None)(x, x_fake, y)
        assert torch.equal(got, -(x - x_fake).abs().mean((1, 2, 3))) and made[-1] == net, name
    assert torch.equal(moodcat.SCORERS["ssim"](None, None)(x, x_fake, y), ssim(x, x_fake))
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).requires_grad_(False)
    energy = moodcat.SCORERS["energy"](None, linear)(x, x_fake, y)
    assert torch.allclose(energy, linear(x).exp().sum(1).log(), atol=1e-6), "energy"
    for name in ("cb", "cb_extra"):
        settings = dict(num_classes=3, ch=2, channels=1)
        assert moodcat.SCORERS[name](settings, None).settings == settings, name

def score_columns(detector, classifier, x, labels):
    """evaluate.score_set with its arguments of today -> {labels: Scored}."""
    scored = evaluate.score_set(detector, classifier, "test", x, labels)
    return {kind: s for (name, kind), s in scored.items() if name == "test"}

def test_scores_under_the_prediction_under_the_truth_and_under_random_labels():
    """The headline's y is C(x); the oracle's the truth, and for OOD uniform over all classes."""
    x, labels = images(1200), torch.arange(1200) % 3
    x, labels = ((x + 1) * 127.5).round().byte(), torch.where(torch.arange(1200) < 300, labels, -1)
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).requires_grad_(False)
    linear[1].weight.mul_(20)
    off = lambda x, x_fake, y: (x_fake - made(x, y)).abs().amax((1, 2, 3))
    detector = tiny_detector({"seen": lambda x, x_fake, y: y.float(), "off": off})
    made = lambda x, y: detector.generator(detector.mask(x)[0], y)[0]
    got, logits = score_columns(detector, linear, x, labels), linear(to_float(x))
    predicted, ood = logits.argmax(1), labels < 0
    assert torch.equal(got["C(x)"].y, predicted), "the prediction is not C(x)"
    assert all(torch.equal(s.truth, labels) for s in got.values())
    seen = got["C(x)"].scores["seen"].long()
    assert torch.equal(seen, predicted), "the headline's label is not C(x)"
    told = got["given"].scores["seen"].long()
    assert torch.equal(got["given"].y, told)
    assert torch.equal(told[~ood], labels[~ood]), "the oracle's label is not the truth"
    assert 0.2 < (predicted == labels)[~ood].float().mean() < 0.6  # so they differ
    pairs = (3 * predicted[ood] + told[ood]).bincount(minlength=9).view(3, 3).double()
    for row in pairs:  # whatever C(x) says
        check_uniform(row, row.sum() / 3)
    assert (told[ood].diff() == 1).float().mean() < 0.6  # nor one after the other
    log_p = logits.log_softmax(1)
    for kind, y in (("C(x)", predicted), ("given", told)):
        scores = got[kind].scores
        assert scores["off"].max() < 1e-5, f"{kind}: x' was made under another label"
        assert torch.allclose(scores["MSP"], log_p.gather(1, y[:, None])[:, 0], atol=1e-5), kind
        assert torch.allclose(scores["energy"], logits.logsumexp(1), atol=1e-4), kind

def test_the_tables_are_of_the_sets_and_labels_that_they_name(whole, tmp_path):
    """Test images, the unknown, held-out training images; those alone calibrate, at y = C(x)."""
    run = shutil.copytree(whole, tmp_path / "run")  # whose classifier is hardly ever right
    start(evaluate.main, "--run", run)
    train, test = (Split("digits", split, list("012345"), 16) for split in ("train", "test"))
    classifier, _, _ = train_scorer.load_classifier(run, None, "cpu")
    detector, rows = MoodCat.load(run / "detector.pt", classifier=classifier), table(run)
    sets = {"in-distribution": (test.x, test.y), "unknown": (test.unknown, None),
            "held-out": (train.x[train.held_out], train.y[train.held_out])}
    for name, (x, y) in sets.items():
        x = to_float(x)
        predicted = classifier(x).argmax(1)
        own = [r for r in rows if (r["set"], r["labels"]) == (name, "C(x)")]
        assert [int(r["y"]) for r in own] == predicted.tolist(), name
        assert [r["truth"] for r in own] == ([str(int(c)) for c in y] if y is not None
                                             else ["OOD"] * len(x)), name
        scores = detector.score(x, predicted)
        for k in ("cb", "ssim"):
            assert torch.allclose(column(rows, k, name), scores[k], atol=1e-3, rtol=1e-3), (name, k)
        if y is not None:
            assert (predicted != y).float().mean() > 0.2
            told = detector.score(x, y)
            given = column(rows, "cb", name, "given")
            assert torch.allclose(given, told["cb"], atol=1e-3, rtol=1e-3)
    held = {k: column(rows, k, "held-out") for k in detector.scorers}
    expected = fit_calibration(held)
    threshold = detector.calibration["threshold"]
    assert threshold == pytest.approx(expected["threshold"], abs=1e-3), "calibrated otherwise"
    for k, values in expected["held_out"].items():
        assert torch.allclose(detector.calibration["held_out"][k], values, atol=1e-3), k

def test_images_get_the_detectors_verdicts(run, folder, tmp_path, monkeypatch, capsys):
    """issue: names with tabs; judging writes nothing."""
    mine, before = write_images(tmp_path / "mine", 1), listing(run)
    (mine / "000.png").rename(mine / "a\tb.png")
    classifier, _, _ = train_scorer.load_classifier(run, None, "cpu")
    for path, n in ((folder / "ood", 8), (mine, 1), (mine / "a\tb.png", 1)):
        start(evaluate.main, "--images", path, "--run", run)
        lines = [ln.split("\t") for ln in capsys.readouterr().out.splitlines() if "\t" in ln]
        x = to_float(read_images(image_files(path), 1, 16))
        detector = MoodCat.load(run / "detector.pt", classifier=classifier)
        ood = detector.is_ood(x, classifier(x).argmax(1)).tolist()
        assert [ln[-1] for ln in lines[1:]] == ["OOD" if o else "in-distribution" for o in ood]
        assert len(lines) == n + 1 and len({len(ln) for ln in lines}) == 1
    assert listing(run) == before

def test_the_second_run_goes_on_with_what_is_left(copy, capsys, monkeypatch):
    """issue: the quickstart's second run was an error. What is not given is the run's own."""
    for name in ("scorer.pt", "results.json", "scores.csv", "detector.pt"):
        (copy / name).unlink()
    before = {name: (copy / f"{name}.pt").read_bytes() for name in ("generator", "classifier")}
    start(train_gen.main, "--run", copy)
    start(train_scorer.main, "--run", copy, "--steps", 20)
    said = capsys.readouterr().out
    for name, content in before.items():
        assert f"{name}.pt holds " in said and (copy / f"{name}.pt").read_bytes() == content
    monkeypatch.setattr(evaluate, "write_csv", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(evaluate.main, "--run", copy)
    assert results(copy)["settings"]["cb"]["steps"] == 20 and load(copy, "detector")

def test_what_a_run_needs_is_checked_before_scoring(run, folder, tmp_path, offline, monkeypatch):
    """issue: a bad --out or missing download was noticed last; an empty --images ran everything."""
    monkeypatch.setattr(evaluate, "score_set", lambda *a: pytest.fail("it scores first"))
    before, judge = listing(run), [evaluate.main, "--run", run]
    for flag in ("--images", "--out", "--ood", "--classifier", "--data"):
        assert f"{flag} is empty" in complaint(*judge, flag, "")
    assert "exists" in complaint(*judge, "--out", run / "generator.pt")
    assert "vgg16" in complaint(*judge, "--scorers", "cb", "lpips")
    assert "error: " in complaint(*judge, "--out", "/proc/x") and listing(run) == before

@pytest.fixture(scope="module")
def trained_on_colour(folder, tmp_path_factory):
    """A run that hardly learned, on the folder; the class "1" is not known."""
    run = ["--run", tmp_path_factory.mktemp("colour") / "run", "--steps", 2, "--ch", 2]
    start(train_gen.main, *run, "--data", folder, "--image-size", 16,
          "--known-classes", "=1+1", "$x_{$")
    start(train_scorer.main, *run, "--net", "conv", "--classifier-steps", 2)
    return run[1]

@pytest.fixture
def colour(trained_on_colour, folder, tmp_path):
    """A copy of that run whose data are a copy of the folder."""
    run, data = shutil.copytree(trained_on_colour, tmp_path / "run"), tmp_path / "data"
    shutil.copytree(folder, data)
    saved = load(run, "generator")
    saved["settings"]["data"] = str(data)
    save_checkpoint(run / "generator.pt", saved)
    return run

def test_odd_names_reach_the_table(colour, folder, monkeypatch):
    """issue: a class $x_{$, a name that is not UTF-8, an OOD set named "."."""
    monkeypatch.chdir(image_files(folder / "ood")[0].rpartition("/")[0])
    for ood in (".", ".."):
        argv = ["--run", colour, "--scorers", "cb", "--ood", ood]
        train_gen.run_script(lambda: start(evaluate.main, *argv))
        rows = table(colour)
        assert {r["truth"] for r in rows} == {"$x_{$", "=1+1", "OOD"}
        assert sum("not utf-8" in r["set"] + r["image"] for r in rows) == 2 * 8
    train_gen.run_script(lambda: start(evaluate.main, "--run", colour, "--images", "."))

def test_data_that_changed_are_noticed(colour, folder, tmp_path):
    """issue: a class "1" was an index, other test folders shifted labels, an added image leaked."""
    split, data = Split(str(folder), "train", ["=1+1", "1"]), tmp_path / "data"
    assert split.classes == ["1", "=1+1"] and (split.x[split.y == 0] < 160).all()
    (data / "test" / "1").rename(data / "test" / "x")
    for main in (train_gen.main, evaluate.main):
        line = complaint(main, "--run", colour)
        assert "must have folders of the same names" in line
    (data / "test" / "x").rename(data / "test" / "1")
    (data / "train" / "$x_{$").rename(data / "train" / "0")
    (data / "test" / "$x_{$").rename(data / "test" / "0")
    assert "known classes ['$x_{$'" in complaint(evaluate.main, "--run", colour, "--scorers", "cb")
    (data / "train" / "0").rename(data / "train" / "$x_{$")
    (data / "test" / "0").rename(data / "test" / "$x_{$")
    shutil.copy(image_files(folder / "ood")[0], data / "train" / "=1+1" / "new.png")
    for main in (train_scorer.main, evaluate.main):
        assert "training images" in complaint(main, "--run", colour)
    argv = ["--data", data, "--known-classes", "=1+1", "$x_{$", "--ch", 2, "--steps", 2,
            "--image-size", 16]
    assert "fingerprint" in complaint(train_gen.main, "--run", colour, *argv)

def test_an_own_classifier_takes_the_place_of_ours(colour, folder, tmp_path, capsys):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 768))  # dark, light
    net[1].bias.zero_()
    wrong = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 3))
    export, x, any_batch = torch.export.export, torch.zeros(2, 3, 16, 16), torch.export.Dim.AUTO
    torch.export.save(export(net, (x,), dynamic_shapes=({0: any_batch},)), tmp_path / "export.pt")
    torch.export.save(export(net, (x,)), tmp_path / "static.pt")  # for batches of 2
    restless = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(768), net[1])
    torch.jit.trace(restless.train(), torch.rand(4, 3, 16, 16)).save(str(tmp_path / "train.pt"))
    for program, file in ((net, "script.pt"), (wrong, "wrong.pt")):
        torch.jit.script(program).save(str(tmp_path / file))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.save(net, tmp_path / "pickled.pt")
    (colour / "classifier.pt").unlink()
    for file in ("script.pt", "export.pt", "static.pt"):
        argv = ["--run", colour, "--classifier", tmp_path / file]
        (colour / "scorer.pt").unlink()
        start(train_scorer.main, *argv, "--steps", 2, "--ch", 2)
        start(evaluate.main, *argv, "--ood", folder / "test/1", "--scorers", "cb", "ssim", "energy")
        assert results(colour)["y = C(x)"]["MSP"]["unknown"]["accuracy"] == 1
        assert results(colour)["settings"]["classifier"] is None
        start(evaluate.main, *argv, "--images", folder / "ood")
    assert "your own with --classifier" in complaint(evaluate.main, "--run", colour)
    capsys.readouterr()
    for words, file in (("2 classes", "wrong"), ("nothere", "nothere"),
                        ("model.eval()", "train"),  # its answer depends on the batch
                        ("torch.export", "weights"), ("torch.export", "pickled")):
        argv = ["--run", colour, "--classifier", tmp_path / f"{file}.pt"]
        assert words in complaint(train_scorer.main, *argv) and not capsys.readouterr().err, file

def test_a_detector_knows_its_classifier(copy, folder, tmp_path):
    """issue: another run's classifier, one stopped early, a C_b of another generator were used."""
    run, judge, own = ["--run", copy], ["--images", folder / "ood"], tmp_path / "own.pt"
    torch.jit.script(train_scorer.load_classifier(copy, None, "cpu")[0]).save(str(own))
    saved = load(copy, "classifier")
    different = {k: v + 1 for k, v in saved["classifier"].items()}
    settings = dict(saved["settings"], classes=list("987654"))
    for changes, words, more in (
            ({}, "another classifier", [*judge, "--classifier", own]),
            (dict(classifier=different), "another classifier", judge),
            (dict(step=8), "--resume", judge), (dict(step=8), "--resume", []),
            (dict(settings=settings), "'9', '8', '7'", []),
            (dict(kind="x"), "not a classifier", [])):
        save_checkpoint(copy / "classifier.pt", {**saved, **changes})
        assert words in complaint(evaluate.main, *run, *more)
    for flag in (["--rule", "ssim"], ["--scorers", "cb"], ["--masks", 2], ["--out", copy / "x"]):
        assert f"as it is: leave out {flag[0]}" in complaint(evaluate.main, *run, *judge, *flag)
    saved = load(copy, "generator")
    saved["generator"]["encoder.mu.bias"] += 1e-6
    save_checkpoint(copy / "generator.pt", saved)
    for main, more in ((evaluate.main, []), (train_scorer.main, ["--steps", 100])):
        assert "generator" in complaint(main, *run, "--classifier", own, *more)

def test_a_detector_that_cannot_work_says_so(folder, tmp_path, capsys):
    """issue: after 14 steps it declared a star and a temple in-distribution, without a warning."""
    start(train_gen.main, "--run", tmp_path, "--ch", 2, "--steps", 3)
    for main, argv in ((train_scorer.main, ["--steps", 3, "--classifier-steps", 1]),
                       (evaluate.main, []), (evaluate.main, ["--images", folder / "ood"])):
        capsys.readouterr()
        start(main, "--run", tmp_path, *argv)
        warnings = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("warning: ")]
        assert any("classifier is right on" in ln for ln in warnings)
        assert any("generator was trained for 0.2 passes" in ln for ln in warnings)

def test_unlabeled_images_train_a_second_scorer_and_are_no_ood_set(copy, folder, monkeypatch):
    """issue: external data was evaluated as OOD although it had trained cb_extra."""
    seen, plain = [], train_scorer.train_step
    monkeypatch.setattr(train_scorer, "train_step", lambda *a: seen.append(a[3:5]) or plain(*a))
    start(train_scorer.main, "--run", copy, "--extra", folder / "ood", "--steps", 4)
    outside = to_float(read_images(image_files(folder / "ood"), 1, 16))
    guesses = train_scorer.load_classifier(copy, None, "cpu")[0](outside).argmax(1).tolist()
    pseudo, offsets = {x.numpy().tobytes(): y for x, y in zip(outside, guesses)}, set()
    for (x, x_m, y), (all_x, all_m, wrong) in seen:  # half known, under both labels; half unlabeled
        n = len(x)
        assert len(all_x) == len(wrong) == 2 * n and torch.equal(all_x[:n], x)
        assert torch.equal(all_m[:n], x_m) and (wrong[:n] != y).all()
        for u, k in zip(all_x[n:], wrong[n:].tolist()):
            offsets.add((k - pseudo[u.numpy().tobytes()]) % 6)
        assert 0 not in offsets, "an unlabeled image under its pseudo label"
        check_masks(all_x[n:], all_m[n:])
    assert offsets == {1, 2, 3, 4, 5}, "not all other labels are drawn"
    argv = ["--run", copy, "--scorers", "cb", "cb_extra", "--masks", 2]
    assert "trained cb_extra" in complaint(evaluate.main, *argv, "--ood", folder / "ood")
    other = complaint(train_scorer.main, "--run", copy, "--extra", folder / "test", "--steps", 4)
    assert "extra_hashes" in other and len(other) < 400  # not every one of them
    start(evaluate.main, *argv, "--ood", folder / "test" / "1")
    assert list(results(copy)["y = C(x)"]["cb_extra"]) == ["unknown", "test/1"]
    shown = results(copy)["settings"]["cb_extra"]
    assert shown["extra"] == str(folder / "ood") and "extra_hashes" not in shown

def short(run, *more):
    sizes = ["--run", run, "--steps", 6, *more]
    return ([train_gen.main, *sizes, "--ch", 2, "--batch-size", 16],
            [train_scorer.main, *sizes, "--classifier-steps", 4, "--ch", 3, "--batch-size", 16])

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    for command in short(run):
        start(*command)
    return run

# --- Photographs: from a folder to verdicts ------------------------------------------------------
def test_steps_follow_passes_and_the_kind_of_device(folder, tmp_path, monkeypatch, capsys):
    """issue: the folder's default announced 760 hours; a resumed run must not plan anew."""
    monkeypatch.setattr(train_gen, "use_device", lambda args: None)  # no GPU here
    wanted = ("digits", "cpu", 0), ("folder", "cpu", 1), ("folder", "cuda", 2), ("digits", "cuda", 0)
    for table in (train_gen.SETTINGS, {**train_scorer.SCORER, **train_scorer.CLASSIFIER}):
        for data, device, column in wanted:
            argv = ["--run", "nowhere", "--data", data, "--device", device]
            args = train_gen.parse(train_gen.Parser("", table), argv, table)
            for name, (*values, _) in table.items():
                value = values[min(column, len(values) - 1)]
                assert getattr(args, name) == value, (data, device, name)
    monkeypatch.undo()
    assert train_gen.count_steps("C_b", 6.0, 32, 2700) == 506  # 6 * 2700 / 32
    assert train_gen.count_steps("C_b", 6.0, 512, 10) == 1
    assert train_gen.count_steps("C_b", 7, 32, 64) == 7
    assert "C_b: 7 steps of 32 images, 3.5 passes over 64 " in capsys.readouterr().out
    start(train_gen.main, "--run", tmp_path / "new", "--data", folder, "--ch", 2, "--image-size", 16)
    first = capsys.readouterr().out.splitlines()[0]
    steps = load(tmp_path / "new", "generator")["settings"]["steps"]
    assert first == f"generator: {steps} steps of 32 images, 6.0 passes over 90 training images"
    assert steps == 17 and type(steps) is int
    monkeypatch.setattr(train_gen, "use_device", lambda args: None)
    argv = ["--run", str(tmp_path / "new"), "--device", "cuda"]  # it goes on elsewhere
    args = train_gen.parse(train_gen.Parser("", train_gen.SETTINGS), argv, train_gen.SETTINGS,
                           "generator")
    assert (args.steps, args.batch_size, args.ch, args.image_size) == (17, 32, 2, 16)

def test_grey_folders_are_grey(folder, tmp_path, capsys):
    for split, n in (("train", 41), ("test", 3)):
        for c, name in enumerate("ab"):
            for file in image_files(write_images(tmp_path / split / name, n, 80 * c)):
                Image.open(file).convert("L").convert("RGB").save(file)
    argv = ["--data", tmp_path, "--ch", 2, "--image-size", 16, "--steps", 1]
    start(train_gen.main, *argv, "--run", tmp_path / "grey")
    assert "channels: 1" in capsys.readouterr().out
    start(train_gen.main, *argv, "--run", tmp_path / "colour", "--channels", 3)
    for name, channels in (("grey", 1), ("colour", 3)):
        assert load(tmp_path / name, "generator")["settings"]["channels"] == channels
        start(train_gen.main, "--run", tmp_path / name)  # they stay so
        start(train_scorer.main, "--run", tmp_path / name, "--steps", 1, "--classifier-steps", 1)
        start(evaluate.main, "--run", tmp_path / name, "--ood", folder / "ood")  # colour pictures
    capsys.readouterr()
    start(evaluate.main, "--run", tmp_path / "grey")  # nothing is OOD
    said = capsys.readouterr().out
    assert "for numbers, name OOD sets" in said and "warning: generator was trained for" in said
    one = image_files(folder / "train" / "1")[:1]
    assert read_images(one, 0, 16).shape[1] == 3 and read_images(one, 1, 16).shape[1] == 1
    # the same order in memory, or a resumed training would round otherwise
    files = image_files(tmp_path / "train" / "a")
    assert all(read_images(files, channels, 16).stride() == (256 * (channels or 1), 256, 16, 1)
               for channels in (0, 1, 3))

def test_what_needs_no_image_is_said_before_any_is_read(colour, folder, tmp_path, monkeypatch):
    """issue: 20 to 44 s for a missing step, a changed setting, a wrong folder, no program."""
    for module in (train_gen, train_scorer, evaluate):
        monkeypatch.setattr(module, "read_images", lambda *a: pytest.fail("it reads images first"))
    gen, sco, eva = train_gen.main, train_scorer.main, evaluate.main
    own, new = ["--run", colour], ["--run", tmp_path / "new"]
    bare = shutil.copytree(colour, tmp_path / "bare", ignore=lambda *_: ["scorer.pt"])
    (tmp_path / "weights.pt").write_bytes(b"no program")
    program = ["--classifier", tmp_path / "weights.pt"]
    write_images(tmp_path / "half" / "train" / "a", 2)
    for words, main, argv in (
            ("run train_gen.py", sco, new), ("run train_gen.py", eva, new),
            ("scorer.pt does not exist: run train_scorer.py", eva, ["--run", bare]),
            ("kl 0.03, not 0.5: --anew", gen, [*own, "--kl", 0.5]),
            ("lr 0.001, not 0.5: --anew", sco, [*own, "--lr", 0.5]),
            ("classifier_lr 0.1, not 0.5: --anew", sco, [*own, "--classifier-lr", 0.5]),
            ("neither a checkpoint nor a program", sco, [*own, *program]),
            ("neither a checkpoint nor a program", eva, [*own, *program]),
            ("does not exist", gen, [*new, "--data", tmp_path / "nowhere"]),
            ("half/test does not exist", gen, [*new, "--data", tmp_path / "half"]),
            ("does not exist", eva, [*own, "--ood", tmp_path / "nowhere"]),
            ("does not exist", sco, [*own, "--extra", tmp_path / "nowhere"]),
            ("data: name the run of digits with --run", sco, [*own, "--data", "digits"])):
        assert words in complaint(main, *argv), argv

def test_anew_trains_over_what_had_other_settings(copy):
    before = {name: load(copy, name) for name in NETS}
    assert "--anew" in complaint(train_scorer.main, "--run", copy, "--steps", 30, "--lr", 0.01)
    start(train_scorer.main, "--run", copy, "--steps", 30, "--lr", 0.01, "--anew")
    after = load(copy, "scorer")
    assert (after["step"], after["settings"]["lr"]) == (30, 0.01)
    assert [json.loads(line)["step"] for line in after["lines"]] == [10, 20, 30], "it went on"
    for name in ("generator", "classifier"):  # these are as they were asked for
        assert same(before[name], load(copy, name))

def test_pictures_that_cannot_be_read_are_lines(run, folder, tmp_path, capsys):
    """issue: one broken picture, and none was judged; a forgotten --run was not seen."""
    mine = write_images(tmp_path / "mine", 3)
    (mine / "001.png").write_bytes(b"half an image")
    start(evaluate.main, "--run", run, "--images", mine)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}: 0, 1, 2, 3, 4, 5; judged by fisher"
    rows = [line.split("\t") for line in lines if "\t" in line][1:]
    assert [Path(row[0]).name for row in rows] == ["000.png", "001.png", "002.png"]
    assert rows[1][1].startswith("unreadable: ") and len(rows[1]) == 2
    assert all(row[-1] in ("OOD", "in-distribution") for row in (rows[0], rows[2]))
    assert lines[-1].endswith("of 2 rejected")
    assert "no picture can be read" in complaint(
        evaluate.main, "--run", run, "--images", mine / "001.png")

def test_a_detector_older_than_its_nets_says_so(copy, folder, tmp_path, capsys):
    judge = [evaluate.main, "--run", copy, "--images", image_files(folder / "ood")[0]]
    start(*judge)
    assert "newer" not in capsys.readouterr().out
    start(train_scorer.main, "--run", copy, "--steps", 110, "--resume")
    start(*judge)
    assert "scorer.pt is newer than the detector: run evaluate.py" in capsys.readouterr().out
    (copy / "classifier.pt").unlink()
    line = complaint(*judge)
    assert "name that one with --classifier" in line and "train_scorer" not in line

def test_own_images_fix_the_thresholds_where_asked(copy, tmp_path):
    """A classifier of one's own has seen the held-out images; --calibrate takes others."""
    test = Split("digits", "test", list("012345"), 16)
    for i, (x, y) in enumerate(zip(test.x[:, 0].numpy(), test.y.tolist())):
        for name, image in (("test", x), ("mine", 255 - x)):
            (tmp_path / name / str(y)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / name / str(y) / f"{i}.png")
    line = complaint(evaluate.main, "--run", copy, "--calibrate", tmp_path / "test")
    assert "training or test split" in line
    start(evaluate.main, "--run", copy, "--calibrate", tmp_path / "mine")
    rows = table(copy)
    assert len(column(rows, "cb", "held-out")) == len(test.x) == 361
    held = {k: column(rows, k, "held-out") for k in ("cb", "ssim", "energy")}
    threshold = load(copy, "detector")["calibration"]["threshold"]
    assert threshold == pytest.approx(fit_calibration(held)["threshold"], abs=1e-3)

def test_the_recorded_command_can_be_called_again(monkeypatch, tmp_path):
    called = ["/venv/bin/python3", "-m", "paper.fair", "--run", "my runs/a", "--on", "x"]
    monkeypatch.setattr("sys.orig_argv", called)
    wanted = "python -m paper.fair --run 'my runs/a' --on x"
    assert evaluate.provenance()["command"] == wanted
    start(train_gen.main, "--run", tmp_path, "--steps", 1, "--ch", 2, "--batch-size", 2)
    assert load(tmp_path, "generator")["command"] == wanted

def test_warnings_say_what_to_do():
    """issue: 'does it take [-1, 1]?' whatever was seen; a useless C_b passed without a word."""
    def lines(accuracy=0.98, classifier=None, aurocs=(0.7, 0.9), **changes):
        log = [json.dumps(dict(step=i, val_auroc=a)) for i, a in enumerate(aurocs)]
        settings = dict(batch_size=10, n=100, classes=["cat", "dog", "emu"])
        saved = dict(step=50, steps=50, lines=log, settings=settings,
                     command="python t.py --resume -x")
        rows = {"generator": {**saved, "lines": []}, "cb": {**saved, **changes}}
        args = argparse.Namespace(classifier=classifier)
        return "\n".join(train_scorer.weaknesses(args, accuracy, rows))
    assert not lines(aurocs=(0.9, 0.9)) and not lines(aurocs=(0.9,)) and not lines(0.67, aurocs=())
    assert "order? ['cat', 'dog', 'emu']" in lines(0.3, "mine.pt2")
    assert "normalise images in [-1, 1]" in lines(0.6, "mine.pt2")
    assert "--classifier-steps" in lines(0.6) and "--classifier-steps" in lines(0.3)
    assert "--calibrate" in lines(0.998, "mine.pt2") and "--calibrate" not in lines(0.998)
    assert "cb still improves, held-out AUROC 0.700, then 0.900" in lines()
    for words, bad in (("stopped at step 40 of 50", dict(step=40)),
                       ("2.5 passes", dict(step=25, steps=25)),
                       ("hardly tells right from mismatched labels", dict(aurocs=(0.5, 0.59)))):
        assert words in lines(**bad), words
    assert lines(step=40).endswith("python t.py -x --resume --steps 50")
    assert lines().endswith("python t.py -x --resume --steps 100")

def test_the_last_sentence_follows_from_the_table(run, capsys):
    start(evaluate.main, "--run", run)
    said = capsys.readouterr().out
    rows = {k: 100 * v["unknown"]["auroc"] for k, v in results(run)["y = C(x)"].items()}
    joint = rows["fisher with energy"]
    best = max(rows, key=rows.get)
    assert f"best is {best} with {rows[best]:.1f}" in said
    for name in ("energy", "MSP"):
        verb = "beats" if joint > rows[name] else "does not beat"
        assert f"{verb} {name} ({joint - rows[name]:+.1f})" in said
    weak = {"unknown": dict(auroc=0.5)}
    strong = {"unknown": dict(auroc=0.9), "else": dict(auroc=0.7)}
    said = evaluate.judgement(dict(energy=strong, MSP=weak, cb=weak), "cb")
    assert "best is energy with 80.0; the detector, cb, has 50.0 and does not beat energy (-30.0)" in said
    said = evaluate.judgement(dict(energy=strong, MSP=weak, cb=weak), "energy")
    assert said.endswith("the detector, energy, has 80.0 and beats MSP (+30.0).")

def test_paper_is_one_word_for_the_papers_scorers(run, monkeypatch):
    asked = []
    for name in ("lpips", "dists"):
        monkeypatch.setitem(moodcat.SCORERS, name, lambda *a, name=name: asked.append(name))
    argv = ["--run", str(run), "--device", "cpu"]
    args = evaluate.make_parser("").parse_args([*argv, "--scorers", "paper", "energy"])
    assert list(evaluate.TrainedRun(args).scorers) == ["cb", "lpips", "dists", "energy"]
    assert evaluate.make_parser("").parse_args(argv).scorers == ["cb", "ssim", "energy"]

# --- What the trainings give their steps ---------------------------------------------------------
def known_images(split):
    """{bytes of a training image as floats: its label}, without the held-out ones."""
    x, y = to_float(split.x[~split.held_out]), split.y[~split.held_out].tolist()
    return {image.numpy().tobytes(): label for image, label in zip(x, y)}

def labels_of(x, known):
    """The true labels of float images, all of which must be training images."""
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() <= 1, "images are not in [-1, 1]"
    found = [known.get(image.numpy().tobytes()) for image in x]
    assert None not in found, "an image that is no training image, or a changed one"
    return torch.tensor(found)

def check_masks(x, x_m):
    """x_m is x but for a rectangle of 0 in each image, drawn anew, of 10 to 30 percent."""
    removed = x_m != x  # no pixel of 8 bits is 0 in [-1, 1]
    assert (x_m[removed] == 0).all(), "what is removed is not 0"
    h, w = removed.any(3).sum(2), removed.any(2).sum(2)
    share = (h * w).float() / x[0, 0].numel()
    assert torch.equal(h * w, removed.sum((2, 3))), "a mask is no rectangle"
    assert share.min() >= 0.1 and share.max() <= 0.3 and share.std() > 0.02, "not 10 to 30 percent"
    assert len({m.numpy().tobytes() for m in removed}) > len(x) / 10, "the masks are alike"

def check_uniform(counts, expected):
    """Chi-square by its degrees of freedom."""
    chi2 = ((counts - expected)**2 / expected).sum() / (len(counts) - 1)
    assert abs(chi2 - 1) < 6 * (2 / (len(counts) - 1)) ** 0.5, f"not uniform: {chi2:.2f} for 1"

def look_at(module, names, monkeypatch, answer):
    """module.train_step only notes its arguments under these names, and each optimiser's rates."""
    seen = []
    def note(*args):
        seen.append(dict(zip(names, args)))
        for name in names:
            if name.startswith("opt"):
                group, = seen[-1][name].param_groups
                seen[-1][f"{name} rate"] = group["lr"]
        seen[-1]["modes"] = [net.training for net in args[:2]]
        return answer
    monkeypatch.setattr(module, "train_step", note)
    return seen

# the arguments of the two train_step of today
GEN_STEP = "G", "D", "opt_g", "opt_d", "x", "x_m", "y", "settings"
SCORER_STEP = "scorer", "G", "opt", "right", "wrong"

@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """The loops of both trainings on the digits, big batches, with steps that only look."""
    run, zero = tmp_path_factory.mktemp("looked"), torch.zeros(())
    argv = ["--run", run, "--ch", 2]
    with pytest.MonkeyPatch.context() as patch:
        gen = look_at(train_gen, GEN_STEP, patch, dict(loss=zero))
        sco = look_at(train_scorer, SCORER_STEP, patch, dict(loss=zero))
        patch.setattr(train_scorer, "LOG_EVERY", 1)  # so that C_b is validated between steps
        start(train_gen.main, *argv, "--steps", 4, "--batch-size", 4000, "--kl", 0.25)
        start(train_scorer.main, *argv, "--steps", 5, "--classifier-steps", 1, "--batch-size", 4000)
    return run, gen, sco, Split("digits", "train", list("012345"), 16)

def check_adam(opt, net, name):
    adam = type(opt) is torch.optim.Adam and opt.defaults["betas"] == (0, 0.999)
    assert adam, f"{name} is not trained by Adam with betas 0, 0.999"
    given = {id(p) for group in opt.param_groups for p in group["params"]}
    assert given == {id(p) for p in net.parameters()}, f"{name} is not all that its Adam trains"

def test_algorithm_1_is_given_masked_training_images_under_their_labels(looked):
    _, seen, _, split = looked
    known, assigned = known_images(split), []
    assert len(seen) == 4
    for step in seen:
        assert torch.equal(step["y"], labels_of(step["x"], known)), "labels of other images"
        check_masks(step["x"], step["x_m"])
        weights = {name: getattr(step["settings"], name) for name in ("kl", *WEIGHTS)}
        assert weights == dict(WEIGHTS, kl=0.25), "a weight is not passed on"
        assert step["modes"] == [True, True], "a net is not in train mode"
        assigned += [image.numpy().tobytes() for image in step["x"]]
    counts = torch.tensor([assigned.count(image) for image in list(known)[::5]]).double()
    check_uniform(counts, 16_000 / int((~split.held_out).sum()))
    assert not torch.equal(seen[0]["x"], seen[1]["x"])

def test_e_d_and_the_unet_are_all_that_their_optimisers_train(looked):
    """Adam with betas 0 and 0.999 (A.2); D^Unet twice as fast as G, at a fixed rate."""
    for step in looked[1]:
        check_adam(step["opt_g"], step["G"], "G")
        check_adam(step["opt_d"], step["D"], "D^Unet")
        assert (step["opt_g rate"], step["opt_d rate"]) == (5e-4, 1e-3), "the rates of G, D^Unet"

@pytest.mark.parametrize("flags", [[], ["--unconditional"]])
def test_the_generator_is_conditional_unless_asked_otherwise(flags, tmp_path, monkeypatch):
    seen = look_at(train_gen, GEN_STEP, monkeypatch, dict(loss=torch.zeros(())))
    start(train_gen.main, "--run", tmp_path, "--ch", 2, "--steps", 1, *flags)
    (step,), x = seen, images(4)
    G, D, y = step["G"].eval(), step["D"].eval(), torch.arange(4)
    assert torch.equal(G(x, y)[0], G(x, y + 1)[0]) == bool(flags), "the label in G"
    assert not torch.equal(D(x, y)[0], D(x, y + 1)[0]), "D^Unet sees y in both"

def test_c_b_is_given_right_pairs_and_pairs_under_wrong_labels(looked):
    """Figure 3: (x, y) with the true label and, for the same masked image, another at random."""
    run, _, seen, split = looked
    known, offsets = known_images(split), []
    saved = load(run, "generator")["generator"]
    assert len(seen) == 5
    for i, step in enumerate(seen):
        (x, x_m, y), (other_x, other_m, wrong) = step["right"], step["wrong"]
        assert torch.equal(x, other_x) and torch.equal(x_m, other_m), "other images"
        true = labels_of(x, known)
        assert torch.equal(y, true), "a right pair's label is not the image's own"
        offsets.append((wrong - true) % 6)
        check_masks(x, x_m)
        assert step["modes"] == [True, False], "C_b in train(), G in eval()"
        assert step["opt rate"] == pytest.approx(1e-3 * (1 - i / 5)), "the rate falls to 0"
        check_adam(step["opt"], step["scorer"], "C_b")
        assert not any(p.requires_grad for p in step["G"].parameters()), "G is not frozen"
        assert torch.equal(step["G"].encoder.mu.weight, saved["encoder.mu.weight"])
    counts = torch.cat(offsets).bincount(minlength=6)
    assert counts[0] == 0, "a wrong pair's label is right"
    check_uniform(counts[1:].double(), len(torch.cat(offsets)) / 5)

def test_the_classifiers_recipe_against_a_plain_one(whole, tmp_path, monkeypatch):
    """SGD with Nesterov's momentum 0.9 and weight decay 5e-4, labels smoothed if asked, a rate that
    rises over a quarter of the steps and falls to 0, on shifted training images in train()."""
    shutil.copy(whole / "generator.pt", tmp_path)
    batches, nets = [], []
    shift, make = train_scorer.augment, train_scorer.make_classifier
    def shifted(x, mirror):
        assert not mirror
        batches.append((x.clone(), shift(x, mirror)))
        return batches[-1][1]
    def made(*settings):
        net = make(*settings)
        nets.append(deepcopy(net))
        return net
    monkeypatch.setattr(train_scorer, "augment", shifted)
    monkeypatch.setattr(train_scorer, "make_classifier", made)
    start(train_scorer.main, "--run", tmp_path, "--steps", 1, "--classifier-steps", 5, "--ch", 2,
          "--smoothing", 0.1)
    saved = load(tmp_path, "classifier")
    known = known_images(Split("digits", "train", list("012345"), 16))
    net, top = nets[0].train(), saved["settings"]["classifier_lr"]
    net.to(memory_format=torch.channels_last)  # as in training: other kernels round otherwise
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    assert len(batches) == 5, "one shifted batch for each step"
    for step, (x, given) in enumerate(batches):
        target = 0.9 * F.one_hot(labels_of(x, known), 6) + 0.1 / 6
        loss = -(target * net(given).log_softmax(1)).sum(1).mean()
        grads = torch.autograd.grad(loss, list(net.parameters()))
        rate = top * np.interp((step + 0.5) / 5, [0, 0.25, 1], [0, 1, 0])
        with torch.no_grad():
            for p, grad, v in zip(net.parameters(), grads, velocity):
                grad = grad + 5e-4 * p
                v.mul_(0.9).add_(grad)
                p -= rate * (grad + 0.9 * v)
    for name, theirs in net.named_parameters():  # decay makes 4e-4 of a weight here
        assert close(saved["classifier"][name], theirs, 5e-5), f"the classifier's {name}"

def test_a_classifier_begins_by_whitening_the_patches(whole, tmp_path, monkeypatch):
    """Of the training images: the first layer's outputs are uncorrelated, of variance one where
    there is any; then the same negated. It may have fewer filters, or more."""
    x = to_float(Split("digits", "train", list("012345"), 16).training_images()[0])
    large = 10 * x  # what keeps a variance of 0 from becoming infinite hardly counts
    patches = torch.stack([large[:, 0, i:i + 15, j:j + 15].flatten() for i in (0, 1) for j in (0, 1)])
    weight = torch.nn.Conv2d(1, 10, 2).weight
    random_rows = weight[8:].clone()
    train_scorer.whiten(weight, large)
    out = weight.flatten(1)[:8] @ patches
    second_moments = out[:4] @ out[:4].T / out.shape[1]
    assert close(second_moments, torch.eye(4), 0.01)
    assert torch.equal(out[:4], -out[4:])
    assert torch.equal(weight[8:], random_rows)
    few = torch.nn.Conv2d(1, 3, 2).weight
    train_scorer.whiten(few, large)
    assert torch.equal(few, weight[:3])
    shares = (weight.flatten(1)[:4] ** 2).sum(1)
    assert (shares.diff() > 0).all(), "the largest variance is not first"

    shutil.copy(whole / "generator.pt", tmp_path)
    start(train_scorer.main, "--run", tmp_path, "--steps", 1, "--classifier-steps", 1, "--ch", 2,
          "--whiten", "--classifier-lr", 1e-6)
    train_scorer.whiten(weight, x[:2000])
    begun = load(tmp_path, "classifier")["classifier"]["0.weight"]
    assert close(begun, weight[:8], 1e-4)

def test_an_interrupted_training_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    """A step's random numbers follow from its number: the last save is all that is needed."""
    gen, sco = short(tmp_path)
    monkeypatch.setattr(train_gen, "SAVE_SECONDS", 0)
    for command, module, name in ((gen, train_gen, "discriminator_loss"), (gen, None, ""),
                                  (sco, train_scorer, "augment"), (sco, train_scorer, "mismatched"),
                                  (sco, None, "")):
        if module:
            calls, plain = [], getattr(module, name)
            def watched(*a):
                calls.append(0)
                if len(calls) == 3:
                    raise KeyboardInterrupt  # as Ctrl-C does
                return plain(*a)
            with monkeypatch.context() as patch:
                patch.setattr(module, name, watched)
                assert "interrupted" in complaint(*command, "--resume")
            assert "2 of" in complaint(*command) and "add --resume" in complaint(*command)
        else:
            start(*command, "--resume")
    for name in NETS:
        assert same(load(whole, name), load(tmp_path, name)), name
        assert len({(run / f"{name}.jsonl").read_text() for run in (whole, tmp_path)}) == 1, name

def test_every_step_seed_and_process_draws_other_numbers(monkeypatch):
    monkeypatch.setattr(train_gen, "WORLD", 2)
    drawn = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(train_gen, "RANK", rank)
        for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
            train_gen.seed_step(seed, step)
            drawn.append(torch.rand(()).item())
    assert len(set(drawn[:8])) == 8 and drawn[8:] == drawn[:4]

def test_a_loss_that_is_not_finite_is_not_written(whole, tmp_path, monkeypatch):
    run = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(train_gen, "train_step", lambda *a: dict(loss=torch.tensor(torch.nan)))
    line = complaint(train_gen.main, "--run", run, "--steps", 7, "--resume")
    assert "a loss is not finite" in line and same(load(whole, "generator"), load(run, "generator"))

def test_validation_leaves_c_b_as_it_was_and_counts_right_and_wrong_labels():
    G, C_b, x = moodcat.for_inference(Generator(3, 2, 16, 1)), BinaryScorer(3, 2, 1), images(60)
    x, y = ((x + 1) * 127.5).round().byte(), torch.arange(60) % 3
    before, args = deepcopy(C_b.state_dict()), argparse.Namespace(mask_ratio=0.2, mask="rectangle")
    train_scorer.validate(C_b, G, x, y, args)
    assert same(dict(C_b.state_dict()), dict(before)) and C_b.training, "validation changed C_b"
    C_b.forward = lambda x, x_fake, label: (label == y).float() - 0.5  # never wrong
    assert train_scorer.validate(C_b, G, x, y, args) == dict(val_auroc=1)

def test_a_log_without_a_checkpoint_begins_anew(whole, tmp_path):
    (tmp_path / "generator.jsonl").write_text('{"step": 3}\n')
    start(*short(tmp_path)[0])
    assert (tmp_path / "generator.jsonl").read_text() == (whole / "generator.jsonl").read_text()
    assert same(load(whole, "generator"), load(tmp_path, "generator"))

def test_memory_that_runs_out_ends_in_one_line_and_other_errors_do_not():
    with pytest.raises(SystemExit, match="too little memory"):
        train_gen.run_script(lambda: torch.empty(10 ** 15))
    with pytest.raises(RuntimeError, match="size"):
        train_gen.run_script(lambda: torch.ones(2) + torch.ones(3))

def test_settings_come_from_the_checkpoint_and_changed_ones_are_refused(tmp_path, capsys):
    """issue: SSIM=0 on a finished run said nothing; Adam's state undid a new learning rate."""
    gen, sco = short(tmp_path, "--seed", 3)
    more = ["--ssim", 0, "--kl", 0, "--mask-ratio", 0, 0, "--lr-g", 1e-3]
    start(*gen, *more)
    start(*sco, "--smoothing", 0.2, "--lr", 2e-3)
    saved = {name: load(tmp_path, name) for name in NETS}
    settings = saved["generator"]["settings"]
    assert [settings[k] for k in ("ssim", "kl", "mask_ratio", "lr_g", "adv", "steps", "ch")] == [
        0, 0, [0, 0], 1e-3, 0.5, 6, 2]
    assert saved["classifier"]["settings"]["smoothing"] == 0.2
    assert saved["scorer"]["settings"]["lr"] == 2e-3
    assert saved["scorer"]["settings"]["mask_ratio"] == [0, 0]  # as the generator's
    for main in (train_gen.main, train_scorer.main):  # nothing given: all is there
        start(main, "--run", tmp_path)
    assert "holds 6 of 6 steps" in capsys.readouterr().out
    for resume in ([], ["--resume"]):
        line = complaint(train_gen.main, "--run", tmp_path, "--ssim", 5, "--lr-g", 5e-4, *resume)
        assert "ssim 0.0, not 5.0" in line and "lr_g 0.001, not 0.0005" in line
        line = complaint(train_scorer.main, "--run", tmp_path, "--classifier-lr", 0.2, *resume)
        assert "classifier_lr 0.1, not 0.2" in line
        assert "steps 6, not 5" in complaint(train_gen.main, "--run", tmp_path, "--steps", 5)
    assert same(saved["generator"], load(tmp_path, "generator"))
    assert "add --resume" in complaint(train_scorer.main, "--run", tmp_path, "--steps", 8)
    start(train_scorer.main, "--run", tmp_path, "--steps", 8, "--resume")
    assert "another run" in capsys.readouterr().out  # its rate had fallen over 6 steps
    assert load(tmp_path, "scorer")["settings"]["steps"] == load(tmp_path, "scorer")["step"] == 8
    start(evaluate.main, "--run", tmp_path, "--seed", 5)
    assert results(tmp_path)["mask"] == dict(ratio=[0, 0], seed=5, style="rectangle")
    shown = results(tmp_path)["settings"]
    for name, where in (("generator", "generator"), ("classifier", "classifier"), ("cb", "scorer")):
        assert shown[name] == json.loads(json.dumps(load(tmp_path, where)["settings"]))

def test_every_setting_of_the_tables_is_a_flag_and_is_recorded(whole):
    for table, name in ((train_gen.SETTINGS, "generator"), (train_scorer.SCORER, "scorer"),
                        (train_scorer.CLASSIFIER, "classifier")):
        assert not table.keys() - load(whole, name)["settings"].keys()

def test_kill_9_at_any_moment_changes_nothing(whole, tmp_path):
    code = ("import torch, train_gen; torch.set_num_threads(1); "  # as here: other threads, other sums
            "train_gen.SAVE_SECONDS = 0; train_gen.LOG_EVERY = 1; "
            "train_gen.run_script(train_gen.main)")
    (main, *argv), log = short(tmp_path)[0], tmp_path / "generator.jsonl"
    words = [sys.executable, "-c", code, *map(str, argv), "--device", "cpu"]
    process = subprocess.Popen(words, cwd=HERE, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
        time.sleep(0.01)  # until it is at work
    process.kill()
    assert process.wait() == -signal.SIGKILL and 0 < load(tmp_path, "generator")["step"] < 6
    start(main, *argv, "--resume")
    ours, theirs = load(whole, "generator"), load(tmp_path, "generator")
    assert all(same(ours[k], theirs[k]) for k in ours if k not in ("lines", "command"))

def test_a_second_training_in_a_run_is_noticed(whole, tmp_path, monkeypatch):
    """issue: two trainings in one run folder both succeeded and interleaved."""
    gen, plain = short(tmp_path)[0], train_gen.train_step
    def meanwhile(*a):
        monkeypatch.setattr(train_gen, "train_step", plain)
        start(*gen)
        return plain(*a)
    monkeypatch.setattr(train_gen, "train_step", meanwhile)
    assert "another training" in complaint(*gen)
    assert same(load(whole, "generator"), load(tmp_path, "generator"))  # the one that was first

def test_held_out_images_train_nothing(whole, tmp_path, monkeypatch):
    class Blacked(Split):
        def __init__(self, *a):
            super().__init__(*a)
            self.x[self.held_out] = 0
    for command, module in zip(short(tmp_path), (train_gen, train_scorer)):
        monkeypatch.setattr(module, "Split", Blacked)
        start(*command)
    assert all(same(load(whole, name)[name], load(tmp_path, name)[name]) for name in NETS)

def test_bfloat16_and_mirrors_are_settings(whole, tmp_path, monkeypatch):
    """issue: mirror images were trained on without being asked for."""
    for command in short(tmp_path, "--bf16"):
        start(*command)
    for name in NETS:
        ours, theirs = load(whole, name), load(tmp_path, name)
        assert theirs["settings"]["bf16"] and not same(ours[name], theirs[name])
        assert theirs["values"] == pytest.approx(ours["values"], rel=0.3, abs=0.3)
    assert load(whole, "classifier")["settings"]["mirror"] is False
    assert load(whole, "scorer")["settings"]["ch"] == 3  # the generator's is 2
    assert "mirror False, not True" in complaint(*short(whole)[1], "--mirror")
    seen, mirrored = [], torch.full((16, 1, 16, 16), 0.5)  # what C_b gets is masked after it
    def note(C_b, G, opt, right, wrong, bf16):
        seen.append(right[:2])
        return dict(loss=right[0].sum())
    monkeypatch.setattr(train_scorer, "augment", lambda x, mirror: mirrored[:len(x)])
    monkeypatch.setattr(train_scorer, "train_step", note)
    (tmp_path / "new").mkdir()
    shutil.copy(whole / "generator.pt", tmp_path / "new")
    start(*short(tmp_path / "new")[1], "--mirror", "--classifier", whole / "classifier.pt")
    assert all((x == 0.5).all() and ((x_m == 0.5) | (x_m == 0)).all() for x, x_m in seen) and seen

def train_alone(path):
    """C_b, on batches that are the same for every number of processes."""
    torch.manual_seed(0)
    G, scorer = Generator(3, 4, 16, 1).eval(), BinaryScorer(3, 4, 1)
    opt = train_gen.averaged(torch.optim.SGD(scorer.parameters(), 0.1))
    for step in range(20):
        torch.manual_seed(step)
        x, y, right = torch.rand(8, 1, 16, 16), torch.arange(8) % 3, torch.arange(8) % 4 < 2
        x, y, right = (t[train_gen.RANK::train_gen.WORLD] for t in (x, y, right))
        judge(G, scorer, opt, x, x / 2, y, right)
    torch.save(scorer.state_dict(), f"{path}/alone-{train_gen.RANK}.pt")

WORKER = """
import sys, torch, train_gen, train_scorer, test_moodcat
class Spy(train_gen.Run):
    def save(self):
        super().save()
        name = self.state["kind"]
        if self.state["step"] == self.state["steps"]:
            weights = dict(self.stateful[name].named_parameters())
            torch.save(weights, f"{sys.argv[1]}/{name}-{train_gen.RANK}.pt")
train_gen.Run = train_scorer.Run = Spy
def main():
    for command in test_moodcat.short(sys.argv[1]):
        test_moodcat.start(*command)
    test_moodcat.train_alone(sys.argv[1])
train_gen.run_script(main)
"""

def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [sys.executable, *torchrun, str(tmp_path / "worker.py"), str(tmp_path)]
    env = dict(os.environ, PYTHONPATH=str(HERE))
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (*NETS, "alone"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert same(first, second), name  # the same weights in both processes
    train_alone(tmp_path)
    one = torch.load(tmp_path / "alone-0.pt")
    assert all(torch.allclose(one[k], first[k], atol=1e-4) for k in one)  # averaged gradients
    assert not same(one, first)  # other rounding

def test_mistakes_end_in_one_line(run, folder, tmp_path):
    gen, sco, eva = train_gen.main, train_scorer.main, evaluate.main
    new, old, data = ["--run", tmp_path / "new"], ["--run", run], ["--data", tmp_path]
    shutil.copytree(run, tmp_path / "part", ignore=lambda *_: ["scorer.pt", "detector.pt"])
    write_images(tmp_path / "train" / "a", 4)
    write_images(tmp_path / "test" / "a", 1)
    assert "two at least" in complaint(gen, *new, *data)
    write_images(tmp_path / "train" / "b", 4)
    write_images(tmp_path / "test" / "b", 1)
    assert "needs 40" in complaint(gen, *new, *data)
    for words, main, argv in (
            ("multiple of 8", gen, [*new, "--image-size", 30]),
            ("invalid choice: 2", gen, [*new, "--channels", 2]),
            ("zebra", gen, [*new, "--known-classes", 0, "zebra"]),
            ("--steps 0 is too small", gen, [*new, "--steps", 0]),
            ("--kl -1.0 is too small", gen, [*new, "--kl", -1]),
            ("--lr-g 0.0 is too small", gen, [*new, "--lr-g", 0]),
            ("mask ratio", gen, [*new, "--mask-ratio", 0.3, 0.1]),
            ("invalid choice: 'oval'", gen, [*new, "--mask", "oval"]),
            ("unrecognized", gen, [*new, "--kl-weight", 0.1]),
            ("'meta' cannot be used", gen, [*new, "--device", "meta"]),
            ("run train_gen.py", sco, new),
            ("run train_scorer.py", eva, ["--run", tmp_path / "part"]),
            ("holds digits: name the run of", sco, [*old, *data]),
            ("invalid choice: 'psnr'", eva, [*old, "--scorers", "psnr"]),
            ("holds no images", eva, [*old, "--ood", HERE / "paper"]),
            ("two sets 'test/1'", eva, [*old, "--ood", *[folder / "test" / "1"] * 2]),
            ("run evaluate.py", eva, ["--run", tmp_path / "part", "--images", folder])):
        line = complaint(main, *argv)
        assert words in line and line.startswith("error: "), argv

def test_imports_go_one_way():
    order = ["moodcat", "train_gen", "train_scorer", "evaluate"]
    for i, name in enumerate(order):
        names = set()
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
        assert names & {*order, "paper", "related", "results", ""} == set(order[:i]), name
