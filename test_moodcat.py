"""pytest -q test_moodcat.py: about 5 minutes on 2 cores, offline.

Formulas are compared with a second implementation or with published check values, scripts are run
for real on the handwritten digits, at a size that shows what they do.
"""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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
from moodcat import (DISTS, LPIPS, BinaryScorer, ConditionalBatchNorm, Decoder, DownBlock,
                     Encoder, Generator, MoodCat, UNetDiscriminator, UpBlock, discriminator_loss, generator_loss,
                     hinge_loss, kl_divergence, load_checkpoint, random_mask, save_checkpoint, ssim)


def images(n, channels=3, size=32, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_detector(scorers=None, num_classes=3, size=16, **options):
    torch.manual_seed(0)
    G = Generator(num_classes, ch=2, image_size=size, channels=1)
    return MoodCat(G, scorers or {"cb": BinaryScorer(num_classes, ch=2, channels=1), "ssim": ssim},
                   **options)


# --- masking -----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [16, 32, 64])
def test_random_mask_is_a_rectangle_inside_the_ratio(size):
    x = images(2000, 1, size)
    x_m, mask = random_mask(x, generator=torch.Generator().manual_seed(1))
    assert mask.shape == (2000, 1, size, size) and mask.dtype == torch.bool
    assert (x_m[mask] == 0).all() and (x_m[~mask] == x[~mask]).all()  # True = removed
    h, w = mask.any(3).sum(2)[:, 0], mask.any(2).sum(2)[:, 0]
    area = mask.sum((1, 2, 3))
    assert (h * w == area).all()
    share = area / size**2
    assert share.min() >= 0.1 and share.max() <= 0.3
    assert abs(share.mean() - 0.2) < 0.01 and abs(share.std() - 0.2 / 12**0.5) < 0.01  # uniform
    assert len({(a, b) for a, b in zip(h.tolist(), w.tolist())}) > 5  # its own sides for each image
    covered = mask.float().mean(0)[0]
    assert (covered > 0).float().mean() > 0.99  # anywhere
    assert torch.allclose(covered, covered.flip(0, 1), atol=0.08)  # in no favoured corner


def test_random_mask_follows_its_generator_and_images_differ():
    x = images(50, 1)
    draw = lambda s: random_mask(x, generator=torch.Generator().manual_seed(s))[1]
    assert (draw(3) == draw(3)).all() and (draw(3) != draw(4)).any()
    assert len({m.numpy().tobytes() for m in draw(3)}) > 40


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_a_single_ratio_removes_about_that_share(ratio):
    for style, slack in (("random", 0.016), ("fixed", 0.02), ("patch", 1 / 32)):
        mask = random_mask(images(100, 1), ratio, style)[1]
        assert (mask.float().mean((1, 2, 3)) - ratio).abs().max() <= slack, style


def test_the_other_mask_styles():
    x = images(64, 3)
    x_m, mask = random_mask(x, style="none")
    assert (x_m == x).all() and not mask.any()
    mask = random_mask(x, 0.25, "fixed")[1]
    assert mask[:, :, 8:24, 8:24].all() and mask[0].sum() == 256  # the centred 16 x 16 square
    squares = F.avg_pool2d(random_mask(x, (0.1, 0.3), "patch")[1].float(), 8)
    assert ((squares == 0) | (squares == 1)).all()
    counts = squares.sum((1, 2, 3))
    assert set(counts.tolist()) == {2.0, 3.0, 4.0} and (squares.mean(0) > 0).all()
    x_m, mask = random_mask(x, style="shuffle")
    cut = lambda t: F.unfold(t, 8, stride=8).transpose(1, 2)
    assert not mask.any() and (x_m != x).any()
    order = torch.cdist(cut(x_m), cut(x)).argmin(2)  # which square went where
    assert (order.sort(1).values == torch.arange(16)).all() and len(order.unique(dim=0)) > 60
    assert torch.equal(cut(x).gather(1, order[:, :, None].expand(-1, -1, 192)), cut(x_m))


def test_mask_errors():
    for bad in (dict(style="blob"), dict(ratio=(0.3, 0.1)), dict(ratio=1.5)):
        with pytest.raises(ValueError):
            random_mask(images(1), **bad)


# --- nets --------------------------------------------------------------------------------------

def test_parameter_counts_are_the_authors():
    count = lambda net: sum(p.numel() for p in net.parameters())
    for net, theirs in ((Encoder(), 460_928), (Decoder(10), 3_821_955),
                        (UNetDiscriminator(10), 4_145_507), (BinaryScorer(10), 272_450)):
        assert abs(count(net) / theirs - 1) < 0.03, type(net).__name__


@pytest.mark.parametrize("size, channels", [(16, 1), (24, 3), (32, 3), (64, 3)])
def test_shapes_and_ranges(size, channels):
    x, y = images(3, channels, size), torch.tensor([0, 1, 4])
    G = Generator(5, ch=4, image_size=size, channels=channels)
    x_fake, mu, logvar = G(x, y)
    assert x_fake.shape == x.shape and x_fake.abs().max() <= 1
    assert mu.shape == logvar.shape == (3, 128)
    logit, pixels = UNetDiscriminator(5, ch=4, channels=channels)(x, y)
    assert logit.shape == (3,) and pixels.shape == (3, 1, size, size)
    assert BinaryScorer(5, ch=4, channels=channels)(x, x_fake, y).shape == (3,)
    for bad in (8, 20):
        with pytest.raises(ValueError, match="multiple of 8"):
            Generator(5, image_size=bad)


def test_conditional_batch_norm_is_batch_norm_with_each_class_affine():
    x, e = torch.randn(6, 5, 4, 4), torch.randn(6, 8)
    ours = ConditionalBatchNorm(5, 8).eval()
    with torch.no_grad():
        gain, bias = 1 + e @ ours.gain.weight.T, e @ ours.bias.weight.T
        for training in (True, False):
            ours.norm.train(training)
            theirs = torch.stack([F.batch_norm(
                x, ours.norm.running_mean.clone(), ours.norm.running_var.clone(), gain[i], bias[i],
                training)[i] for i in range(6)])
            assert torch.allclose(ours(x, e), theirs, atol=1e-5)
        assert ours.norm.running_mean.abs().sum() > 0


def test_residual_blocks_add_their_skip():
    x = images(2, 4, 8)
    up, down, flat = UpBlock(4, 6), DownBlock(4, 6), DownBlock(4, 4, down=False)
    for block in (up, down, flat):
        block.eval()
        block.conv2.forward = torch.zeros_like  # silence the other branch
    assert torch.allclose(up(x), up.skip(F.interpolate(x, scale_factor=2)), atol=1e-6)
    assert torch.allclose(down(x), F.avg_pool2d(down.skip(x), 2), atol=1e-6)
    assert torch.equal(flat(x), x)


def test_spectral_norm_holds_in_every_conditional_net():
    for net in (Decoder(3, ch=4), UNetDiscriminator(3, ch=4), BinaryScorer(3, ch=4)):
        x, y = images(2), torch.tensor([0, 1])
        for _ in range(20):  # the power iteration of a training
            net(*{Decoder: (torch.randn(2, 128), y), UNetDiscriminator: (x, y),
                  BinaryScorer: (x, x, y)}[type(net)])
        layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        for layer in layers:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.1
        assert len(layers) > 10


def test_generator_samples_in_train_and_takes_the_mean_in_eval():
    G, x, y = Generator(3, ch=4), images(4), torch.tensor([0, 1, 2, 0])
    assert not torch.equal(G(x, y)[0], G(x, y)[0])
    G.eval()
    x_fake, mu, _ = G(x, y)
    assert torch.equal(x_fake, G(x, y)[0]) and torch.equal(x_fake, G.decoder(mu, y))
    mu, logvar = torch.zeros(1, 128), torch.full((1, 128), 2.0).log() * 2  # Sigma = 2
    G.encoder.forward = lambda _: (mu.expand(4, -1), logvar.expand(4, -1))
    G.decoder.forward = lambda z, _: z
    assert abs(torch.cat([G.train()(x, y)[0] for _ in range(20)]).std() - 2) < 0.1


def test_each_image_follows_its_own_label():
    x, y = images(2), torch.tensor([0, 1])
    G, D, C_b = Generator(3, ch=4).eval(), UNetDiscriminator(3, ch=4).eval(), BinaryScorer(3, ch=4).eval()
    for net in (lambda y: G(x, y)[0], lambda y: D(x, y)[0], lambda y: D(x, y)[1],
                lambda y: C_b(x, x, y)):
        change = (net(y) - net(torch.tensor([0, 2]))).abs().reshape(2, -1).amax(1)
        assert change[0] < 1e-6 and change[1] > 1e-4  # only the second label changed


def test_both_encoder_heads_get_a_gradient():
    G = Generator(3, ch=4)
    x_fake, mu, logvar = G(images(4), torch.tensor([0, 1, 2, 0]))
    (x_fake.square().mean() + kl_divergence(mu, logvar).mean()).backward()
    for head in (G.encoder.mu, G.encoder.logvar):
        assert head.weight.grad.abs().sum() > 0


# --- losses ------------------------------------------------------------------------------------

def test_kl_divergence_against_torch_distributions():
    mu, logvar = torch.randn(5, 128), torch.randn(5, 128)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl_divergence(mu, logvar), theirs, rtol=1e-4)


def test_adversarial_losses_against_binary_cross_entropy():
    real, fake = torch.randn(4), torch.randn(4)
    real_px, fake_px = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    is_real = lambda t: F.binary_cross_entropy_with_logits(t, torch.ones_like(t))
    is_fake = lambda t: F.binary_cross_entropy_with_logits(t, torch.zeros_like(t))
    assert torch.isclose(discriminator_loss(real, real_px, fake, fake_px),
                         is_real(real) + is_fake(fake) + is_real(real_px) + is_fake(fake_px))
    x, y = images(4), images(4, seed=1)
    theirs = (2 * (is_real(fake) + is_real(fake_px)) + 3 * (x - y).abs().mean()
              + 5 * (x - y).square().mean() + 7 * (1 - ssim(x, y)).mean())
    assert torch.isclose(generator_loss(fake, fake_px, x, y, 2, 3, 5, 7), theirs)


def test_hinge_loss_by_hand():
    # Eq. 2: relu(1 - 2), relu(1 - 0.5), relu(1 + 3) | relu(1 - 2), relu(1 + 0), relu(1 + 1)
    assert torch.isclose(hinge_loss(torch.tensor([2.0, 0.5, -3.0]), torch.tensor([-2.0, 0.0, 1.0])),
                         torch.tensor((0 + 0.5 + 4) / 3 + (0 + 1 + 2) / 3))


def published_pair():
    r = np.random.default_rng(0)
    x = r.random((2, 3, 32, 32))
    y = np.clip(x + 0.1 * r.standard_normal((2, 3, 32, 32)), 0, 1)
    return (torch.from_numpy(a * 2 - 1).float() for a in (x, y))


def test_ssim_check_values():
    x, y = published_pair()
    assert torch.allclose(ssim(x, y), torch.tensor([0.9440343, 0.9469012]), atol=2e-6)
    assert torch.allclose(ssim(x, x), torch.ones(2)) and ssim(x, -x).max() < 0


# --- image quality -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def seeded_weights(tmp_path_factory):
    """A TORCH_HOME with a seeded VGG16 and uniform DISTS weights: the real loading code, offline."""
    from torchvision.models import vgg16
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16().state_dict().items()}
    state = {k: torch.zeros(1).expand(shape) for k, shape in shapes.items()}  # small on disk
    r = np.random.default_rng(1234)
    for name, value in state.items():
        if name.startswith("features") and name.endswith("weight"):
            fan_in = np.prod(value.shape[1:])
            w = r.standard_normal(value.shape) * np.sqrt(2 / fan_in)
            state[name] = torch.from_numpy(w).float()
            state[name.replace("weight", "bias")] = torch.from_numpy(
                0.01 * r.standard_normal(len(w))).float()
    assert abs(state["features.0.weight"].sum() - 9.726634) < 1e-4
    torch.save(state, folder / "vgg16-397923af.pth")
    ones = torch.ones(1, 1475, 1, 1)
    torch.save(dict(alpha=ones, beta=ones), folder / "dists_alpha_beta.pt")
    return home


@pytest.fixture
def torch_home(seeded_weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(seeded_weights))
    file = seeded_weights / "hub" / "checkpoints" / "dists_alpha_beta.pt"
    monkeypatch.setattr(moodcat, "DISTS_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())


def test_lpips_check_values(torch_home):
    x, y = published_pair()
    metric = LPIPS("vgg")
    assert torch.allclose(metric(x, y), torch.tensor([0.0175501, 0.0167098]), atol=2e-6)
    small = images(2, 1, 16)
    assert metric(small, -small).shape == (2,) and metric(small, small).abs().max() < 1e-6


def test_dists_check_values(torch_home):
    x, y = published_pair()
    metric = DISTS()
    assert torch.allclose(metric(x, y), torch.tensor([0.0175726, 0.0155438]), atol=2e-6)
    small = images(2, 1, 16)
    assert (metric(small, -small) > 0.01).all() and metric(small, small).abs().max() < 1e-5


def test_dists_with_the_published_weights(seeded_weights, monkeypatch, tmp_path):
    published = Path(torch.hub.get_dir(), "checkpoints", "dists_alpha_beta.pt")
    if not published.exists():
        pytest.skip(f"no {published}: evaluate.py --scorers dists downloads it")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / published.name).symlink_to(published.resolve())
    vgg = "vgg16-397923af.pth"
    (folder / vgg).symlink_to(seeded_weights / "hub" / "checkpoints" / vgg)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert torch.allclose(DISTS()(*published_pair()), torch.tensor([0.0103576, 0.0086921]), atol=2e-6)


def test_lpips_with_a_pretrained_squeezenet():
    if not Path(torch.hub.get_dir(), "checkpoints", moodcat.WEIGHT_FILES["squeeze"]).exists():
        pytest.skip("no SqueezeNet weights: evaluate.py --scorers lpips-squeeze downloads them")
    x, _ = published_pair()
    metric, blurred = LPIPS("squeeze"), F.avg_pool2d(x, 5, 1, 2)
    near, far = metric(x, x + 0.02 * (blurred - x)), metric(x, blurred)
    assert (near < far).all() and metric(x, x).abs().max() < 1e-6


def test_missing_or_damaged_weights_end_in_one_line(torch_home, monkeypatch, tmp_path):
    monkeypatch.setattr(moodcat, "DISTS_SHA256", "0" * 64)
    with pytest.raises(OSError, match="dists_alpha_beta.pt.*SHA-256.*--scorers cb ssim"):
        DISTS()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda *a, **k: (_ for _ in ()).throw(OSError("no route to host")))
    with pytest.raises(OSError, match="vgg16-397923af.pth.*put the file into .*checkpoints"):
        LPIPS("vgg")
    with pytest.raises(OSError, match="vgg16-397923af.pth"):
        DISTS()


# --- detector ----------------------------------------------------------------------------------

def test_scores_do_not_depend_on_batch_or_order():
    detector, x = tiny_detector(), images(70, 1, 16)
    y = torch.arange(70) % 3
    detector.calibrate(x, y)
    whole = detector.score(x, y)
    assert list(whole) == ["cb", "ssim", "cascade"]
    order = torch.randperm(70)
    for name, value in detector.score(x[order], y[order]).items():
        assert torch.allclose(value, whole[name][order], atol=1e-3 if name == "cascade" else 1e-5)
    for i in (0, 33, 69):
        for name, value in detector.score(x[i:i + 1], y[i:i + 1]).items():
            assert torch.allclose(value, whole[name][i:i + 1], atol=1e-3 if name == "cascade" else 1e-5)
    other_masks = tiny_detector(seed=1).mask(x)[1] != detector.mask(x)[1]
    assert other_masks.flatten(1).any(1).float().mean() > 0.9


def test_folded_nets_and_chunks_change_nothing():
    torch.manual_seed(0)
    G, C_b = Generator(5, ch=8, image_size=16, channels=3), BinaryScorer(5, ch=8, channels=3)
    x, y = images(70, 3, 16), torch.arange(70) % 5
    for _ in range(5):  # statistics unlike those of a fresh net
        C_b(x, G(2 * x + 0.5, y)[0], y)
    G.eval(), C_b.eval()
    before = [v.clone() for v in (*G.state_dict().values(), *C_b.state_dict().values())]
    state = torch.get_rng_state()
    fast = [moodcat.folded(net) for net in (G, C_b)]
    assert torch.equal(state, torch.get_rng_state())
    assert not any("parametrizations" in k for net in fast for k in net.state_dict())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast[0].encoder.modules())
    detector = MoodCat(G, {"cb": C_b, "ssim": ssim})
    with torch.no_grad():
        x_m, _ = detector.mask(x)
        plain = G(x_m, y)
        for ours, theirs in zip(fast[0](x_m, y), plain):
            assert torch.allclose(ours, theirs, atol=1e-5)
        whole = C_b(x, plain[0], y)
        assert torch.allclose(fast[1](x, plain[0], y), whole, rtol=1e-4, atol=1e-4)
    assert torch.allclose(detector.score(x, y)["cb"], whole, rtol=1e-4, atol=1e-4)  # in chunks of 32
    after = (*G.state_dict().values(), *C_b.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_score_signs():
    detector = tiny_detector({"distance": lambda a, b: (a - b).abs().mean((1, 2, 3)), "ssim": ssim})
    x, y = images(4, 1, 16), torch.zeros(4, dtype=torch.long)
    detector.synthesise = lambda x, y, draw: (x, x)  # a perfect synthesis
    scores = detector.score(x, y)
    assert torch.equal(scores["distance"], torch.zeros(4)) and torch.allclose(scores["ssim"], torch.ones(4))
    detector.synthesise = lambda x, y, draw: (x, -x)
    scores = detector.score(x, y)
    assert (scores["distance"] < -0.5).all() and (scores["ssim"] < 0.5).all()


def test_cascade_of_one_scorer_orders_as_that_scorer():
    x, y = images(400, 1, 16), torch.arange(400) % 3
    x[200:300] /= 9
    x[300:] = x[300:].sign()  # beyond anything in the calibration
    detector = tiny_detector({"cb": BinaryScorer(3, ch=2, channels=1)}).calibrate(x[:50], y[:50])
    scores = detector.score(x, y)
    distinct = scores["cb"].unique(return_inverse=True)[1]
    assert torch.equal(distinct, scores["cascade"].unique(return_inverse=True)[1])
    assert scores["cascade"].min() < 0  # continued beyond the end


def test_rank_and_cascade_by_hand():
    knots = moodcat._knots(torch.tensor([3.0, 1.0, 2.0, 2.0]))
    assert torch.allclose(knots[1], torch.tensor([0.2, 0.5, 0.8], dtype=torch.double))
    rank = moodcat._rank(torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0, 4.0]), *knots)
    assert torch.allclose(rank, torch.tensor([-0.1, 0.2, 0.35, 0.5, 0.8, 1.1], dtype=torch.double))
    ranks = dict(a=torch.tensor([0.2, 0.6]), b=torch.tensor([0.3, 0.3]), c=torch.tensor([0.0, 0.0]))
    cascade = moodcat._cascade(ranks, dict(a=0.4, b=0.6, c=0.0))
    assert torch.allclose(cascade, torch.tensor([0.5, 0.5]))
    ways = moodcat._all_shares(["a", "b", "c"])
    assert len(ways) == 66 and all(abs(sum(w.values()) - 1) < 1e-9 for w in ways)


@pytest.mark.parametrize("with_wrong", [False, True])
def test_calibration_keeps_its_promise_on_fresh_images(with_wrong):
    brightness = {"mean": lambda a, b: a.mean((1, 2, 3)), "top": lambda a, b: a.amax((1, 2, 3))}
    detector = tiny_detector(brightness)
    detector.synthesise = lambda x, y, draw: (x, x)  # any scores will do
    x, y = images(9000, 1, 16), torch.zeros(9000, dtype=torch.long)
    accepted = []
    for i in range(0, 6000, 300):
        detector.calibrate(x[i:i + 300], y[i:i + 300], 0.9, y[i:i + 300] + 1 if with_wrong else None)
        accepted.append(1 - detector.is_ood(x[6000:], y[6000:]).float().mean())
    assert abs(np.mean(accepted) - 0.9) < 0.02


def test_each_half_of_the_held_out_images_does_its_own_work():
    x, y = images(120, 1, 16), torch.arange(120) % 3
    fixed = tiny_detector().calibrate(x, y, y_wrong=(y + 1) % 3).calibration
    odd, even = x.clone(), x.clone()
    odd[1::2], even[0::2] = images(60, 1, 16, seed=5), images(60, 1, 16, seed=6) / 8
    changed = tiny_detector().calibrate(odd, y, y_wrong=(y + 1) % 3).calibration
    assert changed["shares"] == fixed["shares"]
    assert not torch.equal(changed["ranks"]["cb"][0], fixed["ranks"]["cb"][0])
    changed = tiny_detector().calibrate(even, y, y_wrong=(y + 1) % 3).calibration
    for name in ("cb", "ssim"):
        assert torch.equal(changed["ranks"][name][0], fixed["ranks"][name][0])


def test_shares_go_to_the_scorer_that_tells_right_from_wrong():
    class Good(BinaryScorer):
        def forward(self, x, x_fake, y):
            return x.mean((1, 2, 3)) - 0.06 * y  # well, not perfectly

    detector = tiny_detector({"noise": lambda a, b: a.amax((1, 2, 3)),
                              "good": Good(2, ch=2, channels=1)}, num_classes=2)
    x, y = images(200, 1, 16), torch.zeros(200, dtype=torch.long)
    shares = detector.calibrate(x, y, y_wrong=y + 1).calibration["shares"]
    assert shares["good"] >= 0.8


def test_calibration_errors():
    detector, x = tiny_detector(), images(10, 1, 16)
    y = torch.zeros(10, dtype=torch.long)
    with pytest.raises(ValueError, match="calibrate"):
        detector.is_ood(x, y)
    with pytest.raises(ValueError, match="10 images"):
        detector.calibrate(x, y)
    with pytest.raises(ValueError, match="y_wrong"):
        detector.calibrate(x, y, 0.5, y)
    with pytest.raises(ValueError, match="labels must be"):
        detector.calibrate(x, y, 0.5, y[:5] + 1)
    before = detector.calibrate(x, y, 0.5).calibration
    with pytest.raises(ValueError):
        detector.calibrate(x, y, 0.95)
    assert detector.calibration is before  # a failed call loses nothing
    with pytest.raises(ValueError, match="C_b is for"):
        tiny_detector({"cb": BinaryScorer(4, ch=2, channels=1)})


def test_bad_tensors_are_refused():
    detector, x, y = tiny_detector(), images(2, 1, 16), torch.tensor([0, 1])
    nan = x.clone()
    nan[0, 0, 0, 0] = float("nan")
    for bad, words in ((x * 127.5 + 127.5, "lie in"), (nan, "finite"), ((x * 100).byte(), "float"),
                       (x[:, :, :8], "takes"), (x.repeat(1, 3, 1, 1), "takes"), (x[:0], "takes")):
        with pytest.raises(ValueError, match=words):
            detector.score(bad, y[:len(bad)])
    for bad, words in ((torch.tensor([0, 3]), "0 to 2"), (torch.tensor([-1, 0]), "0 to 2"),
                       (torch.tensor([0.0, 1.0]), "integers"), (torch.tensor([0]), "shape")):
        with pytest.raises(ValueError, match=words):
            detector.score(x, bad)


def test_save_and_load_give_the_same_scores_bit_for_bit(tmp_path):
    x, y = images(60, 1, 16), torch.arange(60) % 3
    detector = tiny_detector(mask_style="patch", mask_ratio=0.3, seed=7).calibrate(x, y)
    detector.save(tmp_path / "detector.pt")
    loaded = MoodCat.load(tmp_path / "detector.pt", "cpu")
    ours, theirs = detector.score(x, y), loaded.score(x, y)
    assert list(ours) == list(theirs) == ["cb", "ssim", "cascade"]
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(detector.is_ood(x, y), loaded.is_ood(x, y))


def test_perceptual_scorers_are_saved_by_name(torch_home, tmp_path):
    x, y = images(3, 1, 16), torch.tensor([0, 1, 2])
    detector = tiny_detector({"lpips": LPIPS("vgg"), "dists": DISTS()})
    detector.save(tmp_path / "detector.pt")
    assert (tmp_path / "detector.pt").stat().st_size < 2e6  # no VGG inside
    ours, theirs = detector.score(x, y), MoodCat.load(tmp_path / "detector.pt").score(x, y)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours) and (ours["lpips"] < 0).all()


# --- checkpoints -------------------------------------------------------------------------------

def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(OSError, match="does not exist"):
        load_checkpoint(path, "generator")
    save_checkpoint(path, dict(kind="generator", weights=torch.ones(1000)))
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="holds a generator"):
        load_checkpoint(path, "scorer")
    for content in (b"", b"not a checkpoint", whole[:len(whole) // 2], b"PK\x03\x04" + b"0" * 99,
                    b"\x80\x02a.", b"a"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(path, "generator")
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(path, "generator")


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, dict(kind="generator", step=1))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*make room"):
        save_checkpoint(path, dict(kind="generator", step=2))
    assert load_checkpoint(path, "generator")["step"] == 1 and len(list(tmp_path.iterdir())) == 1


# --- metrics -----------------------------------------------------------------------------------

def test_ood_metrics_check_values():
    r = np.random.default_rng(0)
    cases = [([.9, .8, .7, .6, .4], [.75, .5, .3, .2, .1], (.2, .84, .834762, .874643)),
             (r.normal(1, 1, 20).round(2), r.normal(0, 1, 20).round(2),
              (.7, .758750, .767914, .686554))]
    for inside, outside, expected in cases:
        got = ood_metrics(inside, outside)
        assert list(got) == ["fpr95", "auroc", "aupr_in", "aupr_out"]
        assert np.allclose(list(got.values()), expected, atol=1e-6)


def test_ood_metrics_of_a_constant_a_perfect_and_a_tiny_score():
    assert ood_metrics([1.0] * 9, [1.0] * 4)["fpr95"] == 1 and ood_metrics([1.0] * 9, [1.0] * 4)["auroc"] == 0.5
    perfect = ood_metrics(np.arange(10, 20), np.arange(10))
    assert perfect == pytest.approx(dict(fpr95=0, auroc=1, aupr_in=1, aupr_out=1))
    assert ood_metrics(np.arange(10, 20) * 1e-30, np.arange(10) * 1e-30) == perfect
    for bad in (([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [np.inf])):
        with pytest.raises(ValueError):
            ood_metrics(*bad)


def test_baselines_by_hand():
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3))
    x = images(5, 1, 16)
    logits = linear(x)
    got = evaluate.baselines(linear, x, logits.detach())
    assert torch.allclose(got["MSP"], logits.softmax(1).max(1).values)
    assert torch.allclose(got["EBO"], logits.exp().sum(1).log(), atol=1e-5)
    w = linear[1].weight  # d log p_top / dx = (w_top - sum p w) / T, by hand
    p = (logits / 1000).softmax(1)
    grad = (w[logits.argmax(1)] - p @ w).view_as(x)
    moved = linear(x + 0.0028 * grad.sign()) / 1000
    assert torch.allclose(got["ODIN"], moved.softmax(1).max(1).values, atol=1e-7)


# --- data --------------------------------------------------------------------------------------

def digits_settings(**changes):
    return dict(dict(data="digits", known=None, image_size=16), **changes)


def test_splits_are_disjoint_fixed_and_stratified():
    train, test = (train_gen.Split(digits_settings(), s, "cpu") for s in ("train", "test"))
    assert train.classes == test.classes == list("012345")
    assert not set(train.names) & set(test.names)
    assert torch.bincount(train.y[train.held]).tolist() == [30] * 6
    fewer = train_gen.Split(digits_settings(known=["3", "4"]), "train", "cpu")
    at = np.isin(train.names, fewer.names)
    assert set(fewer.names[fewer.held]) == set(train.names[at & train.held.numpy()])
    assert fewer.classes == ["3", "4"] and fewer.y.unique().tolist() == [0, 1]
    assert len(fewer.unknown) + len(fewer.x) == len(train.unknown) + len(train.x)
    only = train_gen.Split(digits_settings(known=["0", "1"], unknown=["9"]), "test", "cpu")
    assert 40 < len(only.unknown) < 80


def test_wrong_labels_are_never_right_and_equally_likely():
    torch.manual_seed(0)
    y = torch.arange(5).repeat(20_000)
    wrong = train_scorer.wrong_labels(y, 5)
    counts = torch.zeros(5, 5).index_put_((y, wrong), torch.ones(()), accumulate=True)
    assert (counts.diagonal() == 0).all()
    assert ((counts[~torch.eye(5, dtype=torch.bool)] / 5000 - 1).abs() < 0.06).all()


def test_likely_wrong_labels_follow_the_classifier():
    torch.manual_seed(0)
    probability = torch.tensor([0.9, 0.06, 0.03, 0.01])
    wrong = train_scorer.wrong_labels(torch.zeros(20_000, dtype=torch.long), 4,
                                      probability.log().expand(20_000, 4))
    assert torch.allclose(wrong.bincount() / 20_000, torch.tensor([0, 0.6, 0.3, 0.1]), atol=0.015)
    wrong = train_scorer.wrong_labels(torch.ones(20_000, dtype=torch.long), 4,  # a misclassified image
                                      probability.log().expand(20_000, 4))
    assert wrong.bincount()[0] > 0.94 * 20_000 and wrong.bincount()[1] == 0


def test_augment_shifts_and_mirrors():
    torch.manual_seed(0)
    x = images(300, 3, 32)
    moved, seen = train_scorer.augment(x, mirror=True), set()
    for image, crop in zip(x, moved):
        padded = F.pad(image[None], (4,) * 4, mode="reflect")[0]
        seen |= {(i, j, flip) for i in range(9) for j in range(9) for flip in (0, 1)
                 if torch.equal((padded.flip(2) if flip else padded)[:, i:i + 32, j:j + 32], crop)}
    assert len(seen) > 120 and len({s[2] for s in seen}) == 2  # of 162 ways


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two colour classes with images of every mode, and a folder of OOD images."""
    root, r = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 12)):
        for c, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                a = r.integers(0, 100, (20, 16, 3), dtype=np.uint8) + np.uint8(150 * c)
                image = Image.fromarray(a)
                image = [image, image.convert("L"), image.convert("RGBA"), image.convert("P"),
                         Image.fromarray(a[:, :, 0].astype(np.uint16) * 257)][i % 5]
                image.save(root / split / name / f"{i:03d}.png")
    (root / "ood" / "deep").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(r.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / "ood/deep" / f"{i}.png")
    return root


def test_images_of_every_mode_come_out_alike(folder):
    x, y, classes, names = train_gen.read_split(str(folder), "train", 16)
    assert x.shape == (120, 3, 16, 16) and x.dtype == torch.uint8 and classes == ["dark", "light"]
    means = x.float().mean((1, 2, 3))
    assert means[y == 0].min() > 35 and means[y == 0].max() < 65  # 16-bit grey rescaled, too
    assert means[y == 1].min() > 185 and means[y == 1].max() < 215
    assert str(names[0]).endswith("000.png")


# --- scripts, for real -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short real training on the digits: all three scripts."""
    run = str(tmp_path_factory.mktemp("runs") / "digits")
    train_gen.main(["--run", run, "--steps", "150", "--device", "cpu"])
    train_scorer.main(["--run", run, "--steps", "150", "--classifier-steps", "40", "--device", "cpu"])
    evaluate.main(["--run", run, "--device", "cpu"])
    return Path(run)


def test_the_scorer_learns_right_from_wrong_labels(run):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [r for r in log if "pair_auroc" in r][-1]
    assert last["phase"] == "scorer" and last["pair_auroc"] > 0.85 and last["pair_accuracy"] > 0.75
    first, final = (r["loss_g"] for r in (log[0], [r for r in log if r["phase"] == "generator"][-1]))
    assert final < 0.8 * first
    best = load_checkpoint(run / "scorer.pt", "scorer")["best"]
    assert best["mark"][0] == max(r["pair_accuracy"] for r in log if "pair_accuracy" in r)


def test_evaluate_writes_numbers_that_agree(run):
    results = json.loads((run / "results.json").read_text())
    with open(run / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    column = lambda name, which: [float(r[name]) for r in rows if r["set"] == which]
    threshold = MoodCat.load(run / "detector.pt").calibration["threshold"]
    assert results["n"] == {k: len(column("cb", k)) for k in ("in-distribution", "unknown")}
    assert results["n"]["unknown"] == 238
    for method in ("MSP", "ODIN", "EBO", "cb", "ssim", "cascade"):
        again = ood_metrics(column(method, "in-distribution"), column(method, "unknown"))
        shown = results["predicted_labels"][method]["unknown"]
        assert all(abs(shown[k] - again[k]) < 1e-9 for k in again), method
    for name, share in results["flagged"].items():
        assert np.mean(np.array(column("cascade", name)) < threshold) == pytest.approx(share)
    assert len(column("cb", "held-out")) == 2 * len(column("cb", "second guess")) == 180
    assert results["oracle_labels"]["cb"]["unknown"]["auroc"] > results["predicted_labels"]["cb"]["unknown"]["auroc"]
    for picture in ("panels.png", "masks.png", "histograms.png", "roc.png", "curves.png",
                    "samples_000150.png"):
        assert (run / picture).stat().st_size > 1000


def test_evaluate_judges_own_images(run, folder, capsys):
    evaluate.main(["--run", str(run), "--images", str(folder / "ood"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].split("\t")[:2] == ["image", "prediction"]
    assert all(line.split("\t")[-1] in ("OOD", "in-distribution") for line in lines[1:9])
    assert (run / "images.png").exists()


def test_a_detector_in_half_precision_is_the_one_that_was_measured(run, folder, tmp_path, capsys):
    argv, out = ["--run", str(run), "--device", "cpu"], tmp_path / "half"
    assert "--half needs an --out" in complaint(evaluate.main, [*argv, "--half"])
    evaluate.main([*argv, "--half", "--out", str(out)])
    for name in ("detector", "classifier"):
        assert (out / f"{name}.pt").stat().st_size < 0.52 * (run / f"{name}.pt").stat().st_size
    with open(out / "scores.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["set"] == "unknown"]
    x = train_gen.Split(digits_settings(), "test", "cpu").unknown
    classifier, _ = train_scorer.load_classifier(out / "classifier.pt", "cpu")
    y = train_scorer.predict(classifier, x, 6).argmax(1)
    scores = MoodCat.load(out / "detector.pt").score(train_gen.to_float(x), y)
    for name, value in scores.items():
        assert torch.allclose(value.float(), torch.tensor([float(r[name]) for r in rows]), atol=1e-4), name
    first, half = (json.loads((f / "results.json").read_text())["predicted_labels"]["cb"]["unknown"]["auroc"]
                   for f in (run, out))
    assert first == pytest.approx(half, abs=0.01)
    with open(run / "scores.csv") as file:
        full = [r["cb"] for r in csv.DictReader(file) if r["set"] == "unknown"]
    assert full != [r["cb"] for r in rows]  # it was rounded
    with pytest.raises(ValueError, match="too large for half precision"):
        moodcat.in_half(dict(variance=torch.tensor([1e6])))
    assert "needs an --out of its own" in complaint(evaluate.main, [*argv, "--half", "--out", str(run)])
    evaluate.main(["--run", str(out), "--images", str(folder / "ood"), "--device", "cpu"])
    assert "of 8 rejected" in capsys.readouterr().out


def test_the_distributed_detector_judges_and_scores_as_measured(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no runs/digits here
    evaluate.main(["--images", str(folder / "ood"), "--device", "cpu"])
    assert "of 8 rejected" in capsys.readouterr().out and Path("images.png").exists()
    detector = MoodCat.load(HERE / "results/digits/detector.pt")
    classifier, _ = train_scorer.load_classifier(HERE / "results/digits/classifier.pt", "cpu")
    split = train_gen.Split(digits_settings(), "test", "cpu")
    scores = []
    for x in (split.x, split.unknown):
        scores.append(detector.score(train_gen.to_float(x), train_scorer.predict(classifier, x, 6).argmax(1)))
    tables = json.loads((HERE / "results/tables.json").read_text())["tables"]
    headline = next(t for t in tables if t["title"] == "Headline: digits")
    for row in headline["rows"][3:6]:  # cb, ssim, cascade
        measured = row["ours"][1]["digits/base-0"]
        assert ood_metrics(*(s[row["method"]] for s in scores))["auroc"] == pytest.approx(measured, abs=0.002)


def test_energy_joins_the_cascade(run, folder, tmp_path, capsys):
    argv = ["--run", str(run), "--device", "cpu", "--out", str(tmp_path)]
    evaluate.main([*argv, "--scorers", "cb", "ssim", "energy"])
    with open(tmp_path / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    tests = [r for r in rows if r["set"] != "second guess"]
    for column in ("energy", "oracle energy"):  # no label changes it
        assert np.allclose([float(r[column]) for r in tests], [float(r["EBO"]) for r in tests], atol=1e-4)
    before, after = (json.loads((f / "results.json").read_text()) for f in (run, tmp_path))
    assert after["shares"]["energy"] == pytest.approx(1 / 3)
    assert after["shares"]["cb"] == pytest.approx(before["shares"]["cb"] * 2 / 3)
    with pytest.raises(ValueError, match="give the classifier"):
        MoodCat.load(tmp_path / "detector.pt")
    classifier, _ = train_scorer.load_classifier(run / "classifier.pt", "cpu")
    detector = MoodCat.load(tmp_path / "detector.pt", classifier=classifier)
    x = train_gen.to_float(train_gen.Split(digits_settings(), "train", "cpu").x[:400])
    first, second = classifier(x).topk(2).indices.T
    calibration = detector.calibrate(x, first, y_wrong=second).calibration
    assert calibration["shares"]["energy"] == pytest.approx(1 / 3) and sum(
        calibration["shares"].values()) == pytest.approx(1)
    shutil.copy(run / "classifier.pt", tmp_path)
    evaluate.main(["--run", str(tmp_path), "--images", str(folder / "ood"), "--device", "cpu"])
    assert "ssim\tenergy\tcascade" in capsys.readouterr().out
    evaluate.main([*argv, "--scorers", "energy"])
    again = json.loads((tmp_path / "results.json").read_text())["predicted_labels"]
    assert again["cascade"]["unknown"]["auroc"] == pytest.approx(again["EBO"]["unknown"]["auroc"])


def test_bfloat16_keeps_the_order_of_the_scores(run):
    split = train_gen.Split(digits_settings(), "test", "cpu")
    x = torch.cat([split.x, split.unknown])
    classifier, _ = train_scorer.load_classifier(run / "classifier.pt", "cpu")
    y = train_scorer.predict(classifier, x, 6).argmax(1)
    full = MoodCat.load(run / "detector.pt")
    half = MoodCat(full.generator, full.scorers, bf16=True)
    ranks = [{k: s.argsort().argsort().double() for k, s in d.score(train_gen.to_float(x), y).items()}
             for d in (full, half)]
    for name in ("cb", "ssim"):
        a, b = (r[name] for r in ranks)
        assert not torch.equal(a, b), name  # it did compute otherwise
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.999, name


def test_one_image_a_dev_split_and_no_ood_set(run, folder, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    argv = ["--run", str(copy), "--device", "cpu"]
    evaluate.main([*argv, "--images", str(folder / "ood" / "deep" / "3.png")])
    assert "of 1 rejected" in capsys.readouterr().out
    evaluate.main([*argv, "--dev", "--unknown-classes", "6", "8"])
    results = json.loads((copy / "results.json").read_text())
    digits = train_gen.Split(digits_settings(unknown=["6", "8"]), "train", "cpu")
    assert results["split"] == "dev"
    assert results["n"] == {"in-distribution": 90, "unknown": len(digits.unknown)}
    monkeypatch.setattr(evaluate, "DEV_UNKNOWN", 50)
    evaluate.main([*argv, "--dev", "--unknown-classes", "6", "8"])
    with open(copy / "scores.csv") as file:
        names = [r["image"] for r in csv.DictReader(file) if r["set"] == "unknown"]
    step = -(-len(digits.unknown) // 50)
    assert step > 2 and names == digits.unknown_names[::step].tolist()
    with pytest.raises(ValueError, match="there is a set 'ood/deep' already"):
        evaluate.main([*argv, "--ood", str(folder / "ood/deep"), str(folder / "ood/deep")])


def test_a_folder_of_colour_images_and_an_own_classifier(folder, tmp_path, capsys):
    run = str(tmp_path / "run")
    common = ["--run", run, "--device", "cpu"]
    train_gen.main([*common, "--data", str(folder), "--image-size", "16", "--ch", "2", "--steps", "3"])
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))  # dark, light
        net[2].bias.zero_()
    evaluated = lambda: json.loads(Path(run, "results.json").read_text())
    torch.jit.script(net).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(2, 3, 16, 16),)), tmp_path / "static.pt2")
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(2, 3, 16, 16),),
                                          dynamic_shapes=({0: torch.export.Dim.AUTO},)), tmp_path / "export.pt2")
    for file in ("script.pt", "export.pt2"):
        for old in ("classifier.pt", "scorer.pt"):
            Path(run, old).unlink(missing_ok=True)
        train_scorer.main([*common, "--classifier", str(tmp_path / file), "--steps", "3"])
        evaluate.main([*common, "--ood", str(folder / "ood"), str(folder / "test"), "--scorers", "cb", "ssim"])
        assert evaluated()["predicted_labels"]["MSP"]["mean"]["accuracy"] == 1.0
        assert len(evaluated()["predicted_labels"]["cb"]) == 4  # two sets, mean, std
    evaluate.main([*common, "--scorers", "cb", "ssim"])  # no OOD set: calibrated, no numbers
    assert "name OOD sets" in capsys.readouterr().out
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 3))).save(str(tmp_path / "wrong.pt"))
    for words, file in (("returns .3, 3., the run has 2 classes", tmp_path / "wrong.pt"),
                        ("must take any batch size", tmp_path / "static.pt2"),
                        ("neither a TorchScript nor", folder / "ood/deep/0.png"),
                        ("holds another classifier", tmp_path / "script.pt")):
        with pytest.raises(ValueError, match=words):
            train_scorer.main([*common, "--classifier", str(file), "--resume"])
    train_scorer.main([*common, "--extra", str(folder / "ood"), "--steps", "3"])  # 8 unlabeled images
    evaluate.main([*common, "--ood", str(folder / "ood"), "--scorers", "cb", "cb_extra", "ssim",
                   "--classifier", str(tmp_path / "script.pt"), "--out", str(tmp_path / "other")])
    results = json.loads((tmp_path / "other" / "results.json").read_text())
    assert len(results["subsets"]) == 7 and results["steps"] == {"cb": 3, "cb_extra": 3, "classifier": None}


def weights_of(run, name):
    saved = load_checkpoint(Path(run, f"{name}.pt"), name)
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for k, v in value.items():
                walk(f"{prefix}.{k}", v)
        elif isinstance(value, list):
            for i, v in enumerate(value):
                walk(f"{prefix}.{i}", v)
        else:
            flat[prefix] = value

    walk("", {k: v for k, v in saved.items() if k != "settings"})
    return flat


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


SMALL = ["--device", "cpu", "--batch-size", "16"]


def generator_argv(run, *more):
    return ["--run", str(run), "--ch", "2", "--steps", "6", *SMALL, *more]


def scorer_argv(run, *more):
    return ["--run", str(run), "--steps", "6", "--classifier-steps", "4", *SMALL, *more]


@pytest.fixture
def every_step(monkeypatch):
    """Log lines and looks at the held-out pairs after every step."""
    monkeypatch.setattr(train_gen, "LOG_EVERY", 1)
    monkeypatch.setattr(train_scorer, "LOG_EVERY", 1)


@pytest.fixture
def whole(tmp_path, every_step):
    """A run that nothing interrupted."""
    train_gen.main(generator_argv(tmp_path / "whole"))
    train_scorer.main(scorer_argv(tmp_path / "whole"))
    return tmp_path / "whole"


def broken_off(monkeypatch, main, argv, module, function, at, how):
    """Run main(argv) until the at-th call of module.function, where how() ends it."""
    plain, calls = getattr(module, function), []

    def ending(*a, **k):
        calls.append(1)
        if len(calls) == at:
            how()
        return plain(*a, **k)

    monkeypatch.setattr(module, function, ending)
    with pytest.raises((SystemExit, MemoryError)) as stop:
        main(argv)
    monkeypatch.setattr(module, function, plain)
    return stop.value


def test_ctrl_c_keeps_a_checkpoint_and_resumes_bit_for_bit(whole, tmp_path, monkeypatch, capsys):
    cut, ctrl_c = tmp_path / "cut", lambda: signal.raise_signal(signal.SIGINT)
    for main, argv, module, function, at in (
            (train_gen.main, generator_argv(cut), train_gen, "discriminator_loss", 3),
            (train_scorer.main, scorer_argv(cut), train_scorer, "augment", 2),
            (train_scorer.main, scorer_argv(cut, "--resume"), train_scorer, "wrong_labels", 4)):
        stop = broken_off(monkeypatch, main, argv, module, function, at, ctrl_c)
        assert stop.code == 130 and "and --resume" in capsys.readouterr().err
        if main is train_gen.main:  # unset flags come from the checkpoint
            main(["--run", str(cut), "--steps", "6", "--device", "cpu", "--resume"])
    train_scorer.main(["--run", str(cut), "--steps", "6", "--device", "cpu", "--resume"])
    for name in ("generator", "classifier", "scorer"):
        assert same(weights_of(whole, name), weights_of(cut, name)), name
    assert (whole / "log.jsonl").read_text() == (cut / "log.jsonl").read_text()
    assert len((cut / "log.jsonl").read_text().splitlines()) == 6 + 4 + 6


def test_a_training_that_dies_resumes_from_its_last_checkpoint(whole, tmp_path, monkeypatch):
    cut = tmp_path / "cut"

    def die():
        raise MemoryError  # no checkpoint on this way out

    for main, argv, module, function in (
            (train_gen.main, generator_argv(cut), train_gen, "discriminator_loss"),
            (train_scorer.main, scorer_argv(cut), train_scorer, "augment"),
            (train_scorer.main, scorer_argv(cut, "--resume"), train_scorer, "wrong_labels")):
        save = train_gen.Loop.save
        monkeypatch.setattr(train_gen, "SAVE_SECONDS", -1)  # a checkpoint after every step ...
        monkeypatch.setattr(train_gen.Loop, "save", lambda self: save(self) if self.step < 3 else None)
        broken_off(monkeypatch, main, argv, module, function, 4, die)  # ... up to the second
        monkeypatch.setattr(train_gen.Loop, "save", save)
        monkeypatch.setattr(train_gen, "SAVE_SECONDS", 60)
        if main is train_gen.main:
            assert load_checkpoint(cut / "generator.pt", "generator")["step"] == 2
            (cut / "generator.pt0a1b.tmp").write_bytes(b"half a checkpoint")
            main([*argv, "--resume"])
    train_scorer.main(scorer_argv(cut, "--resume"))
    assert not list(cut.glob("*.tmp"))
    for name in ("generator", "classifier", "scorer"):
        assert same(weights_of(whole, name), weights_of(cut, name)), name
    lines = lambda run: sorted((run / "log.jsonl").read_text().splitlines())
    assert lines(whole) == lines(cut)  # no gap, no doubles


def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    whole, cut, moment = tmp_path / "whole", tmp_path / "cut", np.random.default_rng(0)
    code = "import SCRIPT as script, train_gen; train_gen.SAVE_SECONDS = 0.1; script.run_script(script.main)"

    def start(script, run, *more):
        argv = ["--run", str(run), "--resume", *SMALL, *more]
        return subprocess.Popen([sys.executable, "-c", code.replace("SCRIPT", script), *argv], cwd=HERE,
                                stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    for script, flags in (("train_gen", ["--ch", "2", "--steps", "100"]),
                          ("train_scorer", ["--steps", "80", "--classifier-steps", "40"])):
        lines = lambda: (cut / "log.jsonl").read_text().count("\n") if (cut / "log.jsonl").exists() else 0
        for kill in range(2):
            before, process = lines(), start(script, cut, *flags)
            while process.poll() is None and lines() <= before:  # it is at work ...
                time.sleep(0.01)
            time.sleep(moment.uniform(0, 0.5))  # ... anywhere in it
            process.kill()
            assert process.wait() in (-signal.SIGKILL, 0)
            for name in ("generator", "classifier", "scorer"):
                assert not (cut / f"{name}.pt").exists() or load_checkpoint(cut / f"{name}.pt", name)
        assert start(script, cut, *flags).wait() == start(script, whole, *flags).wait() == 0
    for name in ("generator", "classifier", "scorer"):
        assert same(weights_of(whole, name), weights_of(cut, name)), name
    assert (whole / "log.jsonl").read_text() == (cut / "log.jsonl").read_text()
    assert not list(cut.glob("*.tmp"))


def test_held_out_images_train_nothing(whole, tmp_path, monkeypatch):
    class Blacked(train_gen.Split):
        def __init__(self, *a):
            super().__init__(*a)
            self.x[self.held] = 0

    monkeypatch.setattr(train_gen, "Split", Blacked)
    monkeypatch.setattr(train_scorer, "Split", Blacked)
    train_gen.main(generator_argv(tmp_path / "black"))
    train_scorer.main(scorer_argv(tmp_path / "black"))
    for name, parts in (("generator", ["generator", "discriminator"]), ("classifier", ["classifier"]),
                        ("scorer", ["scorer"])):
        ours, theirs = (load_checkpoint(run / f"{name}.pt", name) for run in (whole, tmp_path / "black"))
        assert all(same(ours[part], theirs[part]) for part in parts), name


def test_the_kl_weight_and_bf16_reach_the_training(tmp_path):
    kl = {}
    for weight, more in (("0", []), ("3", []), ("3", ["--bf16"])):
        run = tmp_path / f"kl{weight}{len(more)}"
        train_gen.main(["--run", str(run), "--ch", "2", "--steps", "40", "--kl-weight", weight, *SMALL, *more])
        kl[weight, len(more)] = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["kl"]
    assert kl["3", 0] < 0.5 * kl["0", 0]
    assert kl["3", 1] != kl["3", 0] and abs(kl["3", 1] / kl["3", 0] - 1) < 0.5


def test_minutes_end_a_training_with_everything_in_place(tmp_path):
    train_gen.main(["--run", str(tmp_path), "--ch", "2", "--minutes", "0.01", *SMALL])
    assert load_checkpoint(tmp_path / "generator.pt", "generator")["step"] >= 1
    train_scorer.main(["--run", str(tmp_path), "--minutes", "0.01", "--classifier-steps", "2", *SMALL])
    assert load_checkpoint(tmp_path / "scorer.pt", "scorer")["best"]["mark"][0] > 0


def test_a_diverging_training_stops_and_keeps_the_good_checkpoint(tmp_path, monkeypatch):
    argv = ["--run", str(tmp_path), "--ch", "2", "--device", "cpu", "--batch-size", "16", "--steps"]
    train_gen.main([*argv, "2"])
    before = (tmp_path / "generator.pt").read_bytes()
    monkeypatch.setattr(train_gen, "kl_divergence", lambda mu, logvar: mu.sum(1) * float("nan"))
    with pytest.raises(ValueError, match="loss is not finite"):
        train_gen.main([*argv, "40", "--resume"])
    monkeypatch.setattr(train_gen, "LOG_EVERY", 1000)  # a checkpoint falls due before the next look
    monkeypatch.setattr(train_gen, "SAVE_SECONDS", -1)
    with pytest.raises(ValueError, match="weights are not finite"):
        train_gen.main([*argv, "40", "--resume"])
    assert (tmp_path / "generator.pt").read_bytes() == before


# --- the paper's tables ------------------------------------------------------------------------

def test_an_unconditional_generator_ignores_the_label(tmp_path):
    G = Generator(5, ch=4, image_size=16, channels=1, conditional=False).eval()
    x, y = images(6, 1, 16), torch.arange(6) % 5
    right, wrong = G(x, y)[0], G(x, (y + 1) % 5)[0]
    assert torch.equal(right, wrong)
    label_free = BinaryScorer(1, ch=4, channels=1).eval()
    with torch.no_grad():
        right, wrong = (label_free(x, fake, y * 0) for fake in (right, wrong))
    assert moodcat.auroc(right, wrong) == 0.5 and right.unique().numel() == 6
    run = ["--run", str(tmp_path), *SMALL]
    train_gen.main([*run, "--ch", "2", "--steps", "2", "--unconditional"])
    saved = load_checkpoint(tmp_path / "generator.pt", "generator")
    assert saved["discriminator"]["image_head.embed.parametrizations.weight.original"].shape[0] == 1
    train_scorer.main([*run, "--steps", "2", "--classifier-steps", "2"])
    evaluate.main(["--run", str(tmp_path), "--device", "cpu"])
    detector = MoodCat.load(tmp_path / "detector.pt")
    x, y = images(6, 1, 16), torch.arange(6)
    assert torch.equal(detector.synthesise(x, y)[1], detector.synthesise(x, y.flip(0))[1])
    cb, other = detector.score(x, y)["cb"], detector.score(x, y.flip(0))["cb"]
    assert not torch.equal(cb, other)  # C_b keeps its own label


def test_pseudo_labels_are_never_the_sampled_wrong_labels(run, folder, tmp_path, monkeypatch):
    copy, plain = tmp_path / "copy", train_scorer.wrong_labels
    seen, masked, sides, guesses = [], [], [], []
    shutil.copytree(run, copy)

    def spy(y, num_classes, logits=None):
        seen.append((y, plain(y, num_classes, logits)))
        if logits is not None:
            guesses.append((y, logits))
        return seen[-1][1]

    monkeypatch.setattr(train_scorer, "wrong_labels", spy)
    monkeypatch.setattr(train_scorer, "random_mask", lambda x, *a, generator=None, **k: (
        generator or masked.append(x), random_mask(x, *a, generator=generator, **k))[1])
    monkeypatch.setattr(train_scorer, "hinge_loss", lambda right, wrong: (
        sides.append((len(right), len(wrong))), hinge_loss(right, wrong))[1])
    argv = ["--run", str(copy), *SMALL, "--steps", "12"]
    train_scorer.main([*argv, "--extra", "unknown", "--unknown-classes", "6", "7"])
    assert len(seen) == 24 and all(len(y) == 8 for y, _ in seen)  # half known, half unlabeled
    assert all((y != wrong).all() for y, wrong in seen)
    classifier, _ = train_scorer.load_classifier(copy / "classifier.pt", "cpu")
    split = train_gen.Split(digits_settings(unknown=["6", "7"]), "train", "cpu")
    pseudo = train_scorer.predict(classifier, split.unknown, 6).argmax(1)
    label_of = {x.numpy().tobytes(): y for x, y in zip(train_gen.to_float(split.unknown), pseudo.tolist())}
    for x, (y, _) in zip(masked[1::2], seen[1::2]):  # every other batch is the unlabeled half
        assert [label_of[image.numpy().tobytes()] for image in x] == y.tolist()
    assert [s for s in sides if s[0] == 8] == [(8, 16)] * 12  # three kinds of pairs, two negative
    assert (copy / "scorer.pt").read_bytes() == (run / "scorer.pt").read_bytes()

    again = [*argv, "--extra", "unknown", "--unknown-classes", "6", "7", "--negatives"]
    (copy / "scorer_extra.pt").unlink()
    train_scorer.main([*again, "likely"])  # every wrong label by the classifier's logits for that image
    assert len(guesses) == 24 and all(torch.equal(y, logits.argmax(1)) for y, logits in guesses[1::2])
    assert np.mean([torch.equal(y, logits.argmax(1)) for y, logits in guesses[::2]]) > 0.5  # its truth
    (copy / "scorer_extra.pt").unlink()
    labels, step = [], train_scorer.train_step
    monkeypatch.setattr(train_scorer, "train_step", lambda *args: (labels.append(args[7]), step(*args))[1])
    masked.clear()
    train_scorer.main([*again, "pseudo"])
    for x, (_, _, y) in zip(masked[1::2], labels):
        assert [label_of[image.numpy().tobytes()] for image in x] == y.tolist()
    assert len(labels) == 12 and "goes with --extra" in complaint(
        train_scorer.main, [*argv, "--negatives", "pseudo"])
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(run / "generator.pt", fresh)
    assert "run train_scorer.py" in complaint(
        train_scorer.main, ["--run", str(fresh), "--extra", "unknown"])
    assert "holds no images" in complaint(train_scorer.main, [*argv, "--extra", str(fresh)])


def by_hand(inside, ood, oracle_inside, oracle_ood=None):
    """A set of scores for tabulate: (label, prediction, score) of each image."""
    label, prediction, score = zip(*inside, *((-1, 0, s) for s in ood))
    oracle = [*oracle_inside, *(oracle_ood or ood)]
    return {k: torch.tensor(v) for k, v in dict(
        label=label, prediction=prediction, cb=score, **{"oracle cb": oracle}).items()}


def test_a_scood_table_by_hand():
    test = by_hand([(0, 0, 5.0), (1, 1, 4.0), (1, 0, 1.0)], [], [5.0, 4.0, 3.5])
    mixed = by_hand([(1, 1, 3.0), (0, 1, 2.0)], [0.0, 2.5], [2.2, 3.2], [0.0, 3.3])
    pure = by_hand([], [0.5, 6.0, 7.0], [])
    scored = {"in-distribution": test, "mixed": mixed, "pure": pure}
    rows = evaluate.tabulate(scored, {"cb": "cb"}, "predicted_labels")["cb"]
    # 5 4 3 2 1 against 2.5 0: 5 + 3 of 10 pairs; 5 4 1 against 7 6 0.5: 3 of 9
    assert rows["mixed"]["auroc"] == pytest.approx(8 / 10) and rows["pure"]["auroc"] == pytest.approx(3 / 9)
    # k = floor(0.95 n): the threshold is the 4th of 5, 2, and the 2nd of 3, 4
    assert rows["mixed"]["fpr95"] == 1 / 2 and rows["pure"]["fpr95"] == pytest.approx(2 / 3)
    assert rows["mixed"]["accuracy"] == pytest.approx(3 / 5) and rows["pure"]["accuracy"] == pytest.approx(2 / 3)
    assert rows["mean"]["auroc"] == pytest.approx((8 / 10 + 3 / 9) / 2)
    assert rows["std"]["auroc"] == pytest.approx((8 / 10 - 3 / 9) / 2**0.5)
    auroc = lambda labeling: evaluate.tabulate(scored, {"cb": "cb"}, labeling)["cb"]["mixed"]["auroc"]
    assert auroc("predicted_labels") == pytest.approx(8 / 10)
    assert auroc("oracle_labels") == pytest.approx(8 / 10)  # 5 4 3.5 3.2 2.2 against 3.3 0
    assert auroc("true_in_distribution") == pytest.approx(9 / 10)  # ... against 2.5 0
    scored["mixed"]["oracle cb"][2:] += 100  # the OOD images' oracle scores, for one labeling alone
    assert auroc("oracle_labels") == 0 and auroc("true_in_distribution") == pytest.approx(9 / 10)
    test["oracle cb"] -= 100  # in-distribution, the true label: for two
    assert auroc("true_in_distribution") == pytest.approx(3 / 10)  # 3.2 2.2 and three below all
    assert auroc("predicted_labels") == pytest.approx(8 / 10)


@pytest.fixture
def scood(tmp_path):
    """A small benchmark of digits 0 to 5 (known) and 6 to 9, three images of 1 in the OOD list."""
    from sklearn.datasets import load_digits
    digits, root = load_digits(), tmp_path / "scood"
    folder = root / "imglist" / "benchmark_digits"
    folder.mkdir(parents=True)
    for name, wanted, label in (("odd", [7, 9, 1], [-1, -1, 1]), ("even", [6, 8], [-1, -1]),
                                ("digits", [0, 2], [0, 2])):
        lines = []
        for c, sc_label in zip(wanted, label):
            for i in np.flatnonzero(digits.target == c)[:3 if c == 1 else 20]:
                file = root / "images" / f"set {name}" / f"{i}.png"  # a path with a space
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8)).save(file)
                lines.append(f"set {name}/{i}.png " + json.dumps(
                    dict(label=-1, sc_label=sc_label, full_label=c)))
        (folder / f"test_{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_evaluate_on_a_scood_tree(run, scood, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--run", str(run), "--device", "cpu", "--scood", str(scood), "--out", str(out)]
    evaluate.main(argv)
    printed = capsys.readouterr().out
    assert "test_digits.txt lists no OOD image" in printed and "mean" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["n"] == {"in-distribution": 361, "unknown": 238, "odd": 40, "even": 40}
    assert results["n_in_distribution_inside"] == {"odd": 3}
    with open(out / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    odd = [r for r in rows if r["set"] == "odd"]
    inside = [r for r in rows if r["set"] == "in-distribution"] + [r for r in odd if r["label"] != "OOD"]
    assert {r["label"] for r in odd} == {"OOD", "1"} and len(inside) == 364
    values = lambda rows: [float(r["cb"]) for r in rows]
    expected = ood_metrics(values(inside), values([r for r in odd if r["label"] == "OOD"]))
    shown = results["predicted_labels"]["cb"]["odd"]
    assert all(shown[k] == pytest.approx(v) for k, v in expected.items())
    assert shown["accuracy"] == pytest.approx(np.mean([r["label"] == r["prediction"] for r in inside]))
    lists = scood / "imglist" / "benchmark_digits" / "test_odd.txt"
    good = lists.read_text()
    for words, bad in (("test_odd.txt, line 44: ", good + "odd/3.png\n"),
                       ("line 44: .*sc_label", good + 'a.png {"label": 3}\n'),
                       ("line 44: sc_label 6 is not in -1 to 5", good + 'a.png {"sc_label": 6}\n'),
                       ("line 44: sc_label True", good + 'a.png {"sc_label": true}\n'),
                       ("line 44: sc_label 3.0", good + 'a.png {"sc_label": 3.0}\n'),
                       ("test_odd.txt is empty", ""),
                       ("1 of 44 images cannot be read.*nowhere.png", good + 'nowhere.png {"sc_label": -1}\n')):
        lists.write_text(bad)
        assert re.search(words, complaint(evaluate.main, argv)), words
    lists.write_bytes(good.encode() + b"\xff.png {}\n")
    assert "test_odd.txt, line 44: " in complaint(evaluate.main, argv)
    lists.rename(lists.with_name("test_unknown.txt")).write_text(good)
    assert "there is a set 'unknown' already" in complaint(evaluate.main, argv)
    must = "must hold images/ and, for 6 classes, lists"
    assert must in complaint(evaluate.main, [*argv[:-4], "--scood", str(tmp_path)])
    lists.parent.rename(lists.parent.with_name("benchmark_cifar10"))  # labels of another task
    assert must in complaint(evaluate.main, argv)


def test_subsets_of_scorers_score_as_each_subset_alone(run, tmp_path):
    common = ["--run", str(run), "--device", "cpu", "--out"]
    evaluate.main([*common, str(tmp_path / "all")])
    results = lambda name: json.loads((tmp_path / name / "results.json").read_text())
    subsets = results("all")["subsets"]
    assert list(subsets) == ["cb", "ssim", "cb+ssim"]
    assert subsets["cb+ssim"] == results("all")["predicted_labels"]["cascade"]
    for name in ("cb", "ssim"):
        evaluate.main([*common, str(tmp_path / name), "--scorers", name])
        alone = results(name)["predicted_labels"]
        assert subsets[name] == alone[name]
        assert alone["cascade"]["unknown"]["auroc"] == pytest.approx(alone[name]["unknown"]["auroc"])
    held = {k: torch.randn(60) for k in "abc"}
    wrong = {k: torch.randn(30) - 1 for k in "abc"}
    scored = dict(some={p + k: torch.randn(20) for p in ("", "oracle ") for k in "abc"})
    evaluate.add_cascades(scored, held, wrong, list("abc"))
    two = dict(some={p + k: scored["some"][p + k] for p in ("", "oracle ") for k in "ac"})
    evaluate.add_cascades(two, {k: held[k] for k in "ac"}, {k: wrong[k] for k in "ac"}, list("ac"))
    assert torch.equal(scored["some"]["a+c"], two["some"]["cascade"])
    assert torch.equal(scored["some"]["oracle a+c"], two["some"]["oracle cascade"])


def test_the_table_holds_the_saved_detectors_scores(run):
    with open(run / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    detector, split = MoodCat.load(run / "detector.pt"), train_gen.Split(digits_settings(), "test", "cpu")
    column = lambda name, which: torch.tensor([float(r[name]) for r in rows if r["set"] == which])
    random = torch.randint(6, (238,), generator=torch.Generator().manual_seed(0))
    for which, x, prefix, y in (
            ("unknown", split.unknown, "", column("prediction", "unknown").long()),
            ("in-distribution", split.x, "", column("prediction", "in-distribution").long()),
            ("in-distribution", split.x, "oracle ", split.y), ("unknown", split.unknown, "oracle ", random)):
        for name, value in detector.score(train_gen.to_float(x), y).items():
            assert torch.allclose(value.float(), column(prefix + name, which), atol=1e-3), (which, prefix, name)
    train = train_gen.Split(digits_settings(), "train", "cpu")
    x, second = train_gen.to_float(train.x[train.held][::2]), column("prediction", "second guess").long()
    assert torch.allclose(detector.score(x, second)["cb"], column("cb", "second guess"), atol=1e-4)
    assert (second != column("prediction", "held-out").long()[::2]).all()


def test_masks_are_averaged(run, tmp_path):
    detector = MoodCat.load(run / "detector.pt")
    x, y = images(5, 1, 16), torch.arange(5)
    four = MoodCat(detector.generator, detector.scorers, masks=4)
    singles = []
    for draw in range(4):
        x_fake = detector.synthesise(x, y, draw)[1]
        singles.append(dict(cb=detector.scorers["cb"](x, x_fake, y), ssim=ssim(x, x_fake)))
    for name, value in four.score(x, y).items():
        assert torch.allclose(value, torch.stack([s[name] for s in singles]).mean(0), atol=1e-5)
    assert not torch.allclose(singles[0]["cb"], singles[1]["cb"], atol=1e-3)  # other masks
    evaluate.main(["--run", str(run), "--device", "cpu", "--masks", "2", "--mask-style", "fixed",
                   "--mask-ratio", "0.1", "--out", str(tmp_path)])
    loaded = MoodCat.load(tmp_path / "detector.pt")
    assert (loaded.masks, loaded.mask_style, loaded.mask_ratio) == (2, "fixed", [0.1, 0.1])


def test_masking_of_the_training_reaches_scorer_and_evaluation(tmp_path, monkeypatch):
    seen, plain = [], moodcat.random_mask
    for module in (train_gen, train_scorer):
        monkeypatch.setattr(module, "random_mask", lambda x, ratio, style, generator=None: seen.append(
            (style, tuple(ratio))) or plain(x, ratio, style, generator))
    run = ["--run", str(tmp_path), *SMALL]
    train_gen.main([*run, "--ch", "2", "--steps", "2", "--mask-style", "patch", "--mask-ratio", "0.3"])
    train_scorer.main([*run, "--steps", "2", "--classifier-steps", "2"])
    assert set(seen) == {("patch", (0.3, 0.3))}
    evaluate.main(["--run", str(tmp_path), "--device", "cpu"])
    detector = MoodCat.load(tmp_path / "detector.pt")
    assert detector.mask_style == "patch" and detector.mask_ratio == [0.3, 0.3]
    evaluate.main(["--run", str(tmp_path), "--device", "cpu", "--seed", "5"])
    assert MoodCat.load(tmp_path / "detector.pt").seed == 5


def test_another_classifier_needs_no_training(run, tmp_path, capsys):
    other, argv = tmp_path / "linear.pt", ["--run", str(run), "--device", "cpu"]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 6))
    torch.jit.script(net).save(str(other))
    assert "--classifier needs an --out" in complaint(evaluate.main, [*argv, "--classifier", str(other)])
    files = [run / f"{name}.pt" for name in ("generator", "classifier", "scorer", "detector")]
    before = [f.read_bytes() for f in files]
    evaluate.main([*argv, "--classifier", str(other), "--out", str(tmp_path / "out")])
    assert before == [f.read_bytes() for f in files]
    ours, theirs = (MoodCat.load(folder / "detector.pt") for folder in (run, tmp_path / "out"))
    assert ours.calibration["threshold"] != theirs.calibration["threshold"]
    assert same(ours.generator.state_dict(), theirs.generator.state_dict())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["predicted_labels"]["cb"]["unknown"]["accuracy"] < 0.5  # untrained
    evaluate.main([*argv, "--classifier", str(run / "classifier.pt"), "--out", str(tmp_path / "same")])
    same_again, first = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "same", run))
    assert same_again["predicted_labels"] == first["predicted_labels"]


def test_open_set_splits_are_disjoint_and_reproducible(monkeypatch):
    assert len(set(evaluate.ANIMALS)) == 50
    assert not set(evaluate.ANIMALS) & {"bus", "pickup_truck", "train", "tank", "rose", "oak_tree"}
    tens = [evaluate.animals(f"cifar+10:{i}") for i in range(5)]
    assert tens == [evaluate.animals(f"cifar+10:{i}") for i in range(5)]
    assert all(len(set(ten)) == 10 and set(ten) < set(evaluate.animals("cifar+50")) for ten in tens)
    assert len({tuple(ten) for ten in tens}) == 5
    for wrong in ("cifar+10", "cifar+10:7", "cifar+50:1", "cifar+20:1"):
        with pytest.raises(ValueError, match="cifar.10:0 to"):
            evaluate.animals(wrong)

    class Cifar100(list):  # an image of each class, its index in the pixels
        class_to_idx = {name: i for i, name in enumerate(sorted([*evaluate.ANIMALS, "bus", "oak_tree"]))}

    images = Cifar100((Image.new("RGB", (32, 32), (i, i, i)), i) for i in range(52))
    monkeypatch.setattr(evaluate, "download", lambda *a, **k: images)
    for name in ("cifar+50", "cifar+10:3"):
        x, names = evaluate.load_ood(name, 32, 3)
        wanted = {images.class_to_idx[c] for c in evaluate.animals(name)}
        assert set(x[:, 0, 0, 0].tolist()) == wanted and len(names) == len(wanted)
    known = re.findall(r'"(\d \d \d \d \d \d)"', (HERE / "README.md").read_text())
    assert len(set(known)) == 5
    for split in known:
        for part in ("train", "test"):
            a, b = (train_gen.Split(digits_settings(known=split.split()), part, "cpu") for _ in range(2))
            assert a.classes == split.split() and set(a.names) == set(b.names)
            assert not set(a.names) & set(a.unknown_names)
            total = len(a.names) + len(a.unknown_names)
            assert total == (599 if part == "test" else 1198)


def test_bench_counts_what_the_paper_counts(monkeypatch, tmp_path, capsys):
    for name, value in dict(BENCH_SECONDS=0, BENCH_REPEATS=1, BENCH_MATRIX=64,
                            BENCH_BATCHES=dict.fromkeys(evaluate.BENCH_BATCHES, [2])).items():
        monkeypatch.setattr(evaluate, name, value)
    evaluate.main(["--bench", "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path)])
    cost = {k: v["an image"] for k, v in json.loads((tmp_path / "results.json").read_text())["cost"].items()}
    basic = cost["E, D, C_b, 1 mask"]
    assert abs(basic["params"] / 4.552 - 1) < 0.01  # Table 13
    assert abs(basic["macs"] / 0.3745 - 1) < 0.05  # torch's count of the authors' nets; they print 0.408
    parts = [cost[k] for k in ("E", "D", "C_b")]
    assert sum(p["macs"] for p in parts) == pytest.approx(basic["macs"])
    assert cost["E, D, C_b, 4 masks"]["macs"] == pytest.approx(4 * basic["macs"])
    assert abs(cost["classifier: ResNet-18"]["macs"] / 0.556 - 1) < 0.01
    vgg = cost["VGG16, under LPIPS or DISTS"]
    assert abs(vgg["params"] / 14.715 - 1) < 0.001 and abs(vgg["macs"] / 0.630 - 1) < 0.01
    assert cost["E, D, C_b and two VGG16"]["params"] == pytest.approx(basic["params"] + 2 * vgg["params"])
    assert all(c["rate"] > 0 for k, c in cost.items() if k != "first score") and "ResNet-18" in capsys.readouterr().out
    for step, counted in evaluate.COUNTED.items():
        c = cost[f"{step}, batch 2"]
        assert c["share"] == pytest.approx(c["rate"] * counted / c["peak"])
    assert cost["first score"]["seconds"] > 0.3  # it imports PyTorch


def test_tables_gather_runs(run, tmp_path, capsys):
    for seed in "01":
        (tmp_path / "runs" / "digits" / f"base-{seed}").mkdir(parents=True)
        results = json.loads((run / "results.json").read_text())
        results["predicted_labels"]["cascade"]["unknown"]["auroc"] = 0.9 + int(seed) / 50
        (tmp_path / "runs" / "digits" / f"base-{seed}" / "results.json").write_text(json.dumps(results))
    evaluate.main(["--tables", str(tmp_path / "runs"), "--out", str(tmp_path)])
    text = (tmp_path / "TABLES.md").read_text()
    assert re.search(r"\| cascade \| 2 \| .*\| 91.00 ± 1.41 \|", text)
    sweep = dict(of="weight", gain=True, columns=[dict(head="AUROC")], rows=[
        dict(label="1", ours=[dict(a=0.9, b=0.8)]), dict(label="2", ours=[dict(a=0.91, b=0.83)])])
    assert "| 2 | 2 | 87.00 ± 5.66 (+2.00 ± 1.41) |" in evaluate.render(sweep)
    assert re.search(r"\| cascade, Mean \| 0 \|( – \|)+ 38.83 \| 91.39 \|", text)  # no run here
    argv = ["--tables", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert "holds none of the runs" in complaint(evaluate.main, [argv[0], str(tmp_path / "empty"), *argv[2:]])
    results = tmp_path / "runs" / "digits" / "base-1" / "results.json"
    good = json.loads(results.read_text())
    for bad in ("{", "[]", json.dumps(dict(good, predicted_labels={})), json.dumps(dict(good, split="dev"))):
        results.write_text(bad)
        assert "base-1/results.json has no predicted_labels, MSP" in complaint(evaluate.main, argv)


# --- several processes -------------------------------------------------------------------------

WORKER = """
import sys, torch, evaluate, train_gen, train_scorer
out, run, drawn, pids = sys.argv[1], sys.argv[2], [], []
def spy(*batch, plain=train_gen.share):
    part = plain(*batch)
    drawn.append(part[0])
    return part
def save(self, plain=train_gen.Loop.save):
    plain(self)
    torch.save([drawn, {k: p.state_dict() for k, p in self.parts.items()}],
               f"{out}/{self.name}-{train_gen.RANK}.pt")
    drawn.clear()
train_gen.share = train_scorer.share = spy
train_gen.Loop.save = save
common = ["--run", run, "--device", "cpu"]
def main():
    train_gen.main([*common, "--ch", "2", "--steps", "20", "--batch-size", "16"])
    train_scorer.main([*common, "--steps", "20", "--classifier-steps", "20", "--batch-size", "16"])
    evaluate.main(common)
train_gen.run_script(main)
"""


def torchrun(n, *argv):
    """The command that runs argv in n processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--",
            *map(str, argv)]


ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent))


def test_two_processes_train_and_evaluate_as_one(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    for n, command in ((1, [sys.executable, str(worker)]), (2, torchrun(2, worker))):
        (tmp_path / f"out{n}").mkdir()
        subprocess.run([*command, str(tmp_path / f"out{n}"), str(tmp_path / f"run{n}")], env=ONE_THREAD,
                       check=True, capture_output=True)
    for name in ("generator", "classifier", "scorer"):
        drawn, weights = torch.load(tmp_path / f"out1/{name}-0.pt")
        ranks = [torch.load(tmp_path / f"out2/{name}-{rank}.pt") for rank in (0, 1)]
        assert len(drawn) == 20 and all(len(images) == 16 for images in drawn)
        for rank, (own, _) in enumerate(ranks):
            assert all(torch.equal(a[rank::2], b) for a, b in zip(drawn, own)), name
        flat = [weights_in(parts) for _, parts in ranks]
        assert same(*flat), name  # statistics of the batch norms and optimisers, too
        alone = weights_in(weights)
        assert not same(alone, flat[0])  # other batch statistics, other rounding
    scorer = [torch.load(tmp_path / f"out{n}/scorer-0.pt")[1]["scorer"] for n in (1, 2)]
    assert all(torch.isfinite(v).all() for v in scorer[1].values())
    # the detector of two processes, evaluated by one
    again = tmp_path / "again"
    evaluate.main(["--run", str(tmp_path / "run2"), "--device", "cpu", "--out", str(again)])
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (again, tmp_path / "run2"))
    for table in evaluate.LABELINGS:
        for method, sets in ours[table].items():
            for k, v in sets["unknown"].items():
                assert v == pytest.approx(theirs[table][method]["unknown"][k], abs=2e-3), (method, k)
    assert (again / "scores.csv").read_text().count("\n") == (tmp_path / "run2/scores.csv").read_text().count("\n")


def weights_in(parts):
    """Every tensor of nested state dictionaries, by its path."""
    flat = {}

    def walk(path, value):
        for k, v in (value.items() if isinstance(value, dict) else enumerate(value)
                     if isinstance(value, list) else ()):
            walk(f"{path}.{k}", v)
        if torch.is_tensor(value):
            flat[path] = value

    walk("", parts)
    return flat


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    """C_b has no batch norm: its training by two processes equals that by one, but for rounding."""
    worker = tmp_path / "worker.py"
    worker.write_text("""
import sys, torch, train_gen, train_scorer
from moodcat import BinaryScorer, Generator, hinge_loss
def main():
    train_gen.Parser("").parse_args(["--device", "cpu"])  # starts the process group
    torch.manual_seed(0)
    G, scorer = Generator(3, 4, 16, 1).eval(), BinaryScorer(3, 4, 1)
    opt = torch.optim.SGD(scorer.parameters(), 0.1)
    for step in range(20):
        torch.manual_seed(step)
        x, x_m, y = torch.rand(8, 1, 16, 16), torch.rand(8, 1, 16, 16), torch.arange(8) % 3
        train_scorer.train_step(G, scorer, opt, *train_gen.share(x, x_m, y, (y + 1) % 3))
    torch.save(scorer.state_dict(), f"{sys.argv[1]}-{train_gen.RANK}.pt")
train_gen.run_script(main)
""")
    for n, command in ((1, [sys.executable, worker]), (2, torchrun(2, worker))):
        subprocess.run([*command, str(tmp_path / f"w{n}")], env=ONE_THREAD, check=True, capture_output=True)
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("w1-0", "w2-0", "w2-1"))
    assert same(two, other)
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    torch.manual_seed(0)
    Generator(3, 4, 16, 1)
    start = BinaryScorer(3, 4, 1).state_dict()
    assert not any(torch.allclose(start[k], one[k], atol=1e-3) for k in one if "conv1.param" in k and "orig" in k)


def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    worker = tmp_path / "worker.py"
    worker.write_text(f"""
import os, signal, train_gen
train_gen.SAVE_SECONDS = -1  # a checkpoint after every step
def die(step, plain=train_gen.random_mask, n=[0]):
    n[0] += 1
    if n[0] == 12 and train_gen.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain
train_gen.random_mask = lambda *a, **k: die(0)(*a, **k)
train_gen.run_script(lambda: train_gen.main({generator_argv(run)[:-1]!r} + [{SMALL[-1]!r}, "--steps", "900"]))
""".replace('"--steps", "6", ', ""))
    done = subprocess.run(torchrun(2, worker), env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode != 0 and f"error: {train_gen.GONE}" in done.stderr
    step = load_checkpoint(run / "generator.pt", "generator")["step"]
    assert 8 <= step <= 12
    train_gen.main(["--run", str(run), "--device", "cpu", "--steps", str(step + 2), "--resume"])
    assert load_checkpoint(run / "generator.pt", "generator")["step"] == step + 2


# --- what a user can get wrong -----------------------------------------------------------------

def complaint(main, argv):
    """The one line that main(argv) ends in."""
    with pytest.raises(SystemExit) as stop:
        train_gen.run_script(lambda: main(argv))
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


def test_mistakes_end_in_one_line(run, folder, tmp_path, capsys):
    gen, sco, eva = train_gen.main, train_scorer.main, evaluate.main
    (tmp_path / "gen_only").mkdir()
    shutil.copy(run / "generator.pt", tmp_path / "gen_only")
    gen_only = ["--run", str(tmp_path / "gen_only")]
    new, old = ["--run", str(tmp_path / "new")], ["--run", str(run)]
    one = tmp_path / "one"
    (one / "train" / "only").mkdir(parents=True)
    broken = tmp_path / "broken"
    for name in ("a", "b"):
        (broken / "train" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(broken / "train" / name / "fine.png")
    few = str(broken)
    assert "40 are the least" in complaint(gen, [*new, "--data", few])
    (broken / "train" / "b" / "zero.png").touch()
    for words, main, argv in (
            ("--images goes without --classifier", eva, [*old, "--images", few, "--classifier", "x.pt"]),
            ("--unknown-classes goes with", sco, [*old, "--unknown-classes", "7"]),
            ("--mask-ratio takes one number", gen, [*new, "--mask-ratio", "0.3", "0.1"]),
            ("nowhere/train does not exist", gen, [*new, "--data", "nowhere"]),
            ("1 class folder", gen, [*new, "--data", str(one)]),
            ("1 of 3 images cannot be read, the first is", gen, [*new, "--data", few]),
            ("multiple of 8", gen, [*new, "--image-size", "30"]),
            ("no class 'zebra'", gen, [*new, "--known-classes", "0", "zebra"]),
            ("two are the least", gen, [*new, "--known-classes", "3"]),
            ("unrecognized arguments: --rum", gen, ["--rum", "x"]),
            ("--steps must be positive", gen, [*new, "--steps", "0"]),
            ("no device 'abacus'", gen, [*new, "--device", "abacus"]),
            ("exists: go on with --resume", gen, old),
            ("another ch", gen, [*old, "--ch", "4", "--resume"]),
            ("run train_gen.py", sco, new),
            ("exists: go on with --resume", sco, old),
            ("run train_scorer.py", eva, gen_only),
            ("was trained on the classes 0, 1", sco, [*old, "--known-classes", "0", "7"]),
            ("dark", sco, [*old, "--data", str(folder)]),
            ("--image-size 16", eva, [*old, "--image-size", "32"]),
            ("no scorer 'psnr'", eva, [*old, "--scorers", "psnr"]),
            ("holds no images", eva, [*old, "--images", str(one)]),
            ("no_such.png does not exist", eva, [*old, "--images", "no_such.png"]),
            ("run evaluate.py", eva, [*new, "--images", str(folder)])):
        assert words in complaint(main, argv), argv


def test_checkpoints_of_another_run_are_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    argv = ["--run", str(other), "--device", "cpu"]
    train_gen.main([*argv, "--known-classes", "7", "8", "9", "--steps", "2"])
    copy = lambda name: (other / f"{name}.pt").write_bytes((run / f"{name}.pt").read_bytes())
    copy("classifier")
    assert "was trained on the classes 0, 1" in complaint(evaluate.main, argv)
    (other / "classifier.pt").unlink()
    train_scorer.main([*argv, "--classifier-steps", "2", "--steps", "2"])
    copy("scorer")
    assert "other classes and generator_id" in complaint(evaluate.main, argv)
    copy("generator")  # ... of six classes, with this run's classifier of three
    assert "not 0, 1, 2, 3, 4, 5" in complaint(evaluate.main, argv)
    (other / "generator.pt").write_bytes((run / "scorer.pt").read_bytes())
    assert "holds a scorer, not a generator" in complaint(evaluate.main, argv)
    (other / "generator.pt").write_bytes((run / "generator.pt").read_bytes()[:5000])
    assert "damaged" in complaint(evaluate.main, argv)
    wide = Generator(6, ch=4, image_size=16, channels=1)
    with pytest.raises(ValueError, match="x.pt holds a Generator of another width"):
        moodcat.load_weights(wide, Generator(6, ch=2, image_size=16, channels=1).state_dict(), "x.pt")


# --- what the README shows ---------------------------------------------------------------------

HERE = Path(__file__).parent


def test_the_readme_shows_what_was_measured():
    saved = json.loads((HERE / "results" / "tables.json").read_text())
    spec = json.loads((HERE / "results" / "paper.json").read_text())
    text, readme = ((HERE / name).read_text() for name in ("results/TABLES.md", "README.md"))
    for table in saved["tables"]:
        assert f"## {table['title']}\n\n{table['note']}\n\n{evaluate.render(table)}" in text
    shown = re.findall(r"<!-- (.+) -->\n((?:\|.*\n)+)", readme)
    assert len(shown) >= 4 and len(re.findall(r"^\| ---", readme, re.M)) == len(shown) + 2
    for title, rows in shown:
        assert rows == evaluate.render(next(t for t in saved["tables"] if t["title"] == title)), title
    for table in saved["tables"]:  # every number has its run; nothing else differs from the paper's file
        for row in table["rows"]:
            ours = row.pop("ours")
            assert len(ours) == len(table["columns"])
            for run in {run for values in ours for run in values}:
                about = saved["runs"][run]
                assert about["command"].startswith("python evaluate.py") and about["n"]
                assert "revision" in about and "versions" in about
    assert saved["tables"] == spec
