"""python -m pytest -q related: a minute on a CPU, offline; timm, transformers, diffusers where they
are."""

import json
import math
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import train_gen
import train_scorer
from evaluate import ood_metrics
from moodcat import Generator
from related import mood, shift
from train_gen import run_script, to_float

# --- MOOD ----------------------------------------------------------------------------------------
SETTINGS = dict(width=16, depth=2, heads=2, codes=8, steps=4, finetune_steps=2, classes=["a", "b"],
                image_size=16, channels=1, seed=0)
DATA = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8), torch.arange(40) % 2

def mood_arguments(run, resume=False):
    return SimpleNamespace(run=str(run), device="cpu", seed=0, resume=resume, bf16=False,
                           mirror=False, backbone="vit")

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = str(tmp_path_factory.mktemp("runs") / "digits")
    train_gen.main(["--run", run, "--steps", "4", "--device", "cpu"])
    train_scorer.main(["--run", run, "--steps", "4", "--classifier-steps", "10", "--device", "cpu"])
    evaluate.main(["--run", run, "--device", "cpu"])
    return run

def test_mahalanobis_check_values():
    r = np.random.default_rng(0)
    a = (r.normal(size=(20, 3)) + [2, 0, 0]).round(2)
    b = (r.normal(size=(20, 3)) + [0, 2, 0]).round(2)
    test = np.r_[r.normal(size=(4, 3)) + [2, 0, 0], r.normal(size=(4, 3)) + [0, 2, 0]].round(2)
    ood, train, y = (r.normal(size=(4, 3)) - [0, 0, 2]).round(2), np.r_[a, b], [0] * 20 + [1] * 20
    train, test, ood, y = map(torch.tensor, (train, test, ood, y))
    for kind, inside, outside, auroc in (
            ("one", [2.001342, 6.449051, 5.489222], [10.240608, 16.986313], 1),
            ("cc", [1.843921, 5.995368, 7.541964], [11.864441, 15.596295], 1),
            ("shared", [1.425362, 2.647841, 2.296357], [26.710145, 5.661791], 0.96875)):
        unit = (lambda f: f) if kind == "shared" else mood.normalise
        d = [mood.mahalanobis(unit(train), unit(f), y, kind) for f in (test, ood)]
        assert d[0].dtype == torch.float64 and d[0].shape == (8,)
        assert d[0][:3].tolist() == pytest.approx(inside, abs=1e-6), kind
        assert d[1][:2].tolist() == pytest.approx(outside, abs=1e-6), kind
        assert ood_metrics(-d[0], -d[1])["auroc"] == auroc
    own = mood.mahalanobis(mood.normalise(train), mood.normalise(train))
    assert own.mean().item() == pytest.approx(3)  # the rank

def test_mahalanobis_outside_the_span_and_bad_input():
    train = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0]])
    test = np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 9, 0]])
    assert mood.mahalanobis(train, test).tolist() == pytest.approx([0.5, 0.5])
    for labels, kind in ((None, "cc"), (None, "shared"), ([0, 0, 0], "avg"), ([0, 1, 1], "cc")):
        with pytest.raises(ValueError, match="no distance"):
            mood.mahalanobis(train, test, labels, kind)
    assert mood.normalise(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]

def test_blockwise_mask_check_values_and_never_larger_than_asked():
    mask = mood.blockwise_mask(14, 75, 16, random.Random(0))
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [0, 0, 0, 7, 6, 6, 8, 8, 8, 8, 6, 6, 6, 6]
    for grid in (14, 75, 16), (8, 24, 5), (4, 6, 1), (4, 1, 3):
        rng, count = random.Random(1), grid[1]
        sums = [int(mood.blockwise_mask(*grid, rng).sum()) for _ in range(1000)]
        assert max(sums) <= count and (count == 1 or np.mean(sums) > 0.85 * count)
        assert grid[0] < 14 or (min(sums) >= 60 and np.mean(sums) == pytest.approx(74.5, abs=0.3))

def test_losses_check_values_and_masked_patches_only():
    y, logits = torch.tensor([0]), torch.tensor([[2.0, 1, 0]])
    assert mood.smoothed_loss(logits, y).item() == pytest.approx(0.507606, abs=1e-6)
    assert mood.smoothed_loss(logits, y, 0.0).item() == pytest.approx(0.407606, abs=1e-6)
    for n, least in (10, 0.500288), (30, 0.643202):  # p is the smoothed label
        p = torch.full((1, n), 0.1 / n) + 0.9 * F.one_hot(y, n)
        assert mood.smoothed_loss(p.log(), y).item() == pytest.approx(least, abs=1e-6)
    logits = torch.zeros(2, 16, 8192, requires_grad=True)
    tokens, mask = torch.randint(8192, (2, 16)), torch.rand(2, 16) < 0.4
    (loss := mood.mim_loss(logits, tokens, mask)).backward()
    assert loss.item() == pytest.approx(math.log(8192), abs=1e-5)
    assert torch.equal(logits.grad.abs().sum(2) > 0, mask)
    elsewhere = torch.randn_like(logits) * ~mask[:, :, None]
    assert mood.mim_loss(logits + elsewhere, tokens, mask) == loss

def test_a_masked_patch_is_not_seen():
    net, x = mood.ViT(8, 16, 1, 16, 2, 2).eval(), torch.randn(2, 1, 16, 16)
    mask, other = torch.zeros(2, 16, dtype=torch.bool), x.clone()
    mask[:, 5], other[:, :, 4:8, 4:8] = True, 3.0  # patch 5 is row 1, column 1
    assert torch.allclose(net(x, mask), net(other, mask)) and net(x, mask).shape == (2, 16, 8)
    assert not torch.allclose(net(x), net(other)) and net(x).shape == (2, 8)

def test_tokens_are_the_nearest_centroids():
    grey = torch.tensor([0, 80, 160, 240])[torch.randperm(48) % 4].view(3, 1, 4, 4).byte()
    x = grey.repeat_interleave(4, 2).repeat_interleave(4, 3)  # patches of one grey each
    tokens, grey = mood.Tokenizer(x, 4)(mood.to_float(x)).flatten(), grey.flatten()
    assert len(tokens.unique()) == len(set(zip(tokens.tolist(), grey.tolist()))) == 4

def test_rates_of_the_layers():
    net = mood.ViT(8, 16, 1, 16, 3, 2)
    groups = {id(p): g["peak"] for g in mood.layer_groups(net, 1.0, 0.5) for p in g["params"]}
    some = net.positions, net.blocks[0].norm1.weight, net.blocks[2].linear1.bias, net.norm.weight
    assert [groups[id(p)] for p in some] == [1 / 16, 1 / 8, 1 / 2, 1]
    assert len(groups) == len(list(net.parameters()))

def test_logit_scores_against_autograd():
    f, head = torch.randn(3, 5), torch.nn.Linear(5, 4)
    scores = mood.logit_scores(head(f), f)
    for i in range(3):
        p = torch.distributions.Categorical(logits=head(f[i]))
        kl = F.kl_div(p.logits, torch.full((4,), 0.25), reduction="sum")
        norm = torch.autograd.grad(kl, head.weight, retain_graph=True)[0].abs().sum()
        right = dict(GradNorm=norm, entropy=-p.entropy(), softmax=p.logits.max(),
                     energy=head(f[i]).exp().sum().log())
        assert {k: v[i].item() for k, v in scores.items()} == pytest.approx(
            {k: v.item() for k, v in right.items()}, rel=1e-5)

def test_mood_stages_are_trained_as_table_4_says(tmp_path, monkeypatch):
    train, loss, forward, calls, seen, judged = (
        mood.train, mood.mim_loss, mood.ViT.forward, {}, [], [])
    def watched(args, name, net, rate, decay, settings, steps, *more, **parts):
        calls[name] = rate, decay, steps, {k: v.clone() for k, v in net.state_dict().items()}
        return train(args, name, net, rate, decay, settings, steps, *more, **parts)
    monkeypatch.setattr(mood, "train", watched)
    monkeypatch.setattr(mood, "mim_loss", lambda *a: judged.append(a[2]) or loss(*a))
    monkeypatch.setattr(mood.ViT, "forward", lambda net, x, mask=None: (
        seen.append(mask) or forward(net, x, mask)))
    stages = mood.stages(mood_arguments(tmp_path), SETTINGS, *DATA)
    assert {k: v[:3] for k, v in calls.items()} == {
        "mood_pt": (mood.RATE, 1, 4), "mood_ft": (mood.TUNE_RATE, 1, 2),
        "mood_ft_long": (mood.TUNE_RATE, 1, 6),
        "mood_pt_ft": (mood.TUNE_RATE, pytest.approx(mood.DECAY**0.5), 2)}  # of two blocks
    start, pt = calls["mood_pt_ft"][3], stages["pt"].state_dict()
    neither = stages["neither"].state_dict()
    for k, v in start.items():  # the pretrained body, a fresh head; ft begins at random weights
        assert torch.equal(v, neither[k] if k.startswith("head") else pt[k]), k
        assert torch.equal(calls["mood_ft"][3][k], neither[k]), k
    assert not torch.equal(pt["embed.weight"], neither["embed.weight"])
    seen = [mask for mask in seen if mask is not None]  # hidden from the net: what the loss asks
    assert len(judged) == 4 and all(map(torch.equal, seen, judged)) and all(map(torch.any, seen))
    with pytest.raises(ValueError, match="mood_ft.pt has another finetune_steps"):  # not mood_pt
        mood.stages(mood_arguments(tmp_path), dict(SETTINGS, finetune_steps=3), *DATA)

def test_mood_scores_are_minus_the_distances():
    torch.manual_seed(0)
    net, (x, y) = mood.ViT(2, 16, 1, 16, 2, 2).eval(), DATA
    with torch.no_grad():
        f = net.features(to_float(x))
    scores = mood.score("pt+ft", net, x, y, dict(all=(x, y, None)))["all"]
    unit = mood.normalise(f)
    for kind, features in (("one", unit), ("cc", unit), ("shared", f)):
        want = mood.mahalanobis(features, features, y, kind)
        assert torch.allclose(scores[f"MOOD pt+ft {kind}"], -want, rtol=1e-6), kind
    assert torch.equal(scores["prediction"], net.head(f).argmax(1))
    nearest = torch.stack([mood.mahalanobis(unit[y == c], unit) for c in (0, 1)]).argmin(0)
    pt = mood.score("pt", net, x, y, dict(all=(x, y, None)))["all"]
    assert torch.equal(pt["prediction"], nearest) and "MOOD pt softmax" not in pt

def test_mood_resumed_is_uninterrupted_and_scores_any_batch(tmp_path, monkeypatch):
    whole = mood.stages(mood_arguments(tmp_path / "a"), SETTINGS, *DATA)
    steps, loss = iter(range(4)), mood.mim_loss
    def interrupted(*inputs):
        if next(steps, None) == 1:
            signal.raise_signal(signal.SIGINT)
        return loss(*inputs)
    monkeypatch.setattr(mood, "mim_loss", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 2"):
        mood.stages(mood_arguments(tmp_path / "b"), SETTINGS, *DATA)
    resumed = mood.stages(mood_arguments(tmp_path / "b", resume=True), SETTINGS, *DATA)
    for stage, net in whole.items():
        again = resumed[stage].state_dict()
        assert all(torch.equal(v, again[k]) for k, v in net.state_dict().items()), stage
    x, y = DATA
    sets = dict(all=(x, y, None), some=(x[7:8], y[7:8], None))
    scores = mood.score("pt+ft", whole["pt+ft"], x, y, sets)
    for column in scores["all"]:
        assert torch.allclose(scores["all"][column][7:8], scores["some"][column], rtol=1e-3), column

def test_mood_end_to_end_and_bad_input(run, capsys, monkeypatch):
    few = ["--run", run, "--device", "cpu", "--steps", "3", "--finetune-steps", "2"]
    stages, split = mood.stages, train_gen.Split("digits", "train", size=16)
    def watched(args, settings, images, y):
        assert torch.equal(images, split.x[~split.held])  # no held-out image trains
        return stages(args, settings, images, y)
    with monkeypatch.context() as patch:
        patch.setattr(mood, "stages", watched)
        mood.main(few)
    shown, saved = capsys.readouterr().out, json.loads(Path(run, "mood.json").read_text())
    rows = saved["predicted_labels"]
    assert all(name in shown for name in ("MSP", "cb", *rows)) and saved["n"]["unknown"] == 238
    assert {"MOOD neither cc", "MOOD ft long shared", "MOOD pt one",
            "MOOD ft one", "MOOD pt+ft one", "MOOD pt+ft GradNorm"} <= set(rows)
    results = Path(run, "results.json")
    whole = json.loads(results.read_text())
    for change in (dict(n=dict(whole["n"], unknown=237)), dict(settings=dict(fingerprint="0"))):
        results.write_text(json.dumps(dict(whole, **change)))
        mood.main(few)
        assert f"no rows of {results}" in (shown := capsys.readouterr().out) and "MSP" not in shown
    results.write_text(json.dumps(whole))
    mood.main([*few, "--dev", "4", "5"])
    saved = json.loads(Path(run, "dev-4-5", "mood.json").read_text())
    assert saved["settings"]["classes"] == list("0123")
    assert "MSP" not in capsys.readouterr().out
    for words in (["--dev", "0", "1", "2", "3", "4"], ["--dev", "4", "--ood", "svhn"]):
        with pytest.raises(ValueError, match="must leave two"):
            mood.main([*few, *words])
    def short(args):  # one training image of class 0
        generator, about, split = load_run(args)
        split.held |= (split.y == 0) & (torch.arange(len(split.y)) > split.y.tolist().index(0))
        return generator, about, split
    load_run = mood.load_run
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="two training images"):
        patch.setattr(mood, "load_run", short)
        mood.main([*few])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OSError, match="pip install timm"):
        mood.main([*few, "--backbone", "timm:beit_base_patch16_224.in22k_ft_in22k"])

def test_timm_end_to_end(run, monkeypatch):
    timm = pytest.importorskip("timm")
    def tiny(name, pretrained, num_classes):
        net = timm.models.beit.Beit(img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2,
                                    num_classes=num_classes)
        net.pretrained_cfg = dict(mean=(0.5,) * 3 if name == "tiny" else (0.485, 0.456, 0.406))
        return net
    monkeypatch.setattr(timm, "create_model", tiny)
    with pytest.raises(OSError, match="images in"):
        mood.TimmNet("of ImageNet's mean", 6)
    net, x = mood.TimmNet("tiny", 6).eval(), torch.rand(2, 3, 32, 32) * 2 - 1  # the centre's 28
    tokens = net.net.forward_features(x[..., 2:30, 2:30])
    assert torch.allclose(net.features(x), net.net.fc_norm(tokens[:, 1:].mean(1)), atol=1e-5)
    mood.main(["--run", run, "--device", "cpu", "--finetune-steps", "1", "--backbone", "timm:tiny"])
    rows = json.loads(Path(run, "mood_timm.json").read_text())["predicted_labels"]
    assert {"timm:tiny pt one", "timm:tiny pt+ft one", "timm:tiny pt+ft softmax"} <= set(rows)

# --- SHIFT ---------------------------------------------------------------------------------------
def job(net="conv", **more):
    """What main() gathers, with random nets for 3 classes of 16 px."""
    torch.manual_seed(0)
    x, y = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8), torch.arange(40) % 3
    net = train_scorer.make_classifier(net, (8, 16, 32, 64), 3, 1).eval().requires_grad_(False)
    return SimpleNamespace(x=x, y=y, net=net, G=Generator(3, 2, 16, 1).eval(), device="cpu", seed=0,
                           classes=["cat", "car", "cow"], **more)

def test_shift_check_values():
    A = torch.tensor([[[[1.0, 2], [0, 3]], [[2, 0], [1, 1]]]])
    G = torch.tensor([[[[0.5, -1], [2, 1]], [[-1, 3], [1, 0]]]])
    assert shift.layer_cam(A, G).tolist() == [[[0.5, 0], [1, 3]]]
    z, is_ood = torch.tensor([-2.0, 0, 1.5, 3]).double(), torch.tensor([0, 0, 1, 1])
    assert abs(shift.rejection_loss(z, is_ood).item() - 0.267519) < 1e-6
    paper = -torch.where(is_ood == 1, 1 - torch.sigmoid(-z), torch.sigmoid(-z)).log().mean()
    assert torch.allclose(shift.rejection_loss(z, is_ood == 1), paper)
    with torch.device("meta"):
        psi = [shift.RejectionNetwork(features).parameters() for features in (8192, 73_728)]
    assert [sum(p.numel() for p in own) for own in psi] == [16_781_313, 150_999_041]
    rates = [round(shift.rate(epoch / 5), 6) for epoch in range(5)]
    assert rates == [0.01, 0.009045, 0.006545, 0.003455, 0.000955]

def test_threshold_dilation_and_images_without_an_object():
    P = torch.tensor([[[[-1.386295, -1.386293]]]]).double().sigmoid()  # 0.2 is between them
    assert shift.holes(P, 0.2, 1)[0].flatten().tolist() == [False, True]
    P = torch.zeros(3, 1, 352, 352)
    P[0, :, 100:150, 100:160] = 1
    P.flatten(1)[1, :2478] = P.flatten(1)[2, :2479] = 1  # 2% of 352 x 352 are 2478.08
    hole, there = shift.holes(P, 0.2, 25)
    assert hole[0].sum() == 6216 and hole[0, 0, 88:162, 88:172].all()
    assert there.tolist() == [True, False, True] and not shift.holes(P * 0, 0.2, 25)[1].any()

@pytest.mark.parametrize("name", ["conv", "resnet18"])
def test_the_cam_is_that_of_the_label_and_leaves_the_classifier_alone(name):
    it = job(name)
    before, x = {k: v.clone() for k, v in it.net.state_dict().items()}, to_float(it.x[:5])
    erase, P = shift.cam(it), shift.cam(it)(x, it.y[:5])
    assert P.min() >= 0 and P.max() <= 1 and (P != erase(x, it.y[1:6])).any()
    assert torch.allclose(erase(x[2:3], it.y[2:3]), P[2:3], atol=1e-4)  # of its image alone
    logits, found = shift.maps(it.net, x)
    rest = (lambda m: it.net.fc(m.mean((2, 3)))) if name == "resnet18" else it.net[16:]
    A = [m for m in found if m[0, 0].numel() > 1][-1].requires_grad_()
    G, = torch.autograd.grad(rest(A)[torch.arange(5), it.y[:5]].sum(), A)  # from that map on
    want = F.interpolate(shift.layer_cam(A, G)[:, None], (16, 16), mode="bilinear").flatten(1)
    want = want - want.amin(1, keepdim=True)
    assert torch.allclose(P.flatten(1) * want.amax(1, keepdim=True), want, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in it.net.state_dict().items())
    assert not any(m._forward_hooks for m in it.net.modules()) and torch.equal(it.net(x), logits)

@torch.no_grad()
def test_fakes_differ_inside_the_hole_alone():
    it = job()
    x, hole = to_float(it.x), shift.random_mask(to_float(it.x), 0.3)[1]
    fakes = {name: shift.FILL[name](it)(x, hole, it.y) for name in ("zero", "patch", "generator")}
    for fake in fakes.values():
        assert torch.equal(fake[~hole], x[~hole]) and (fake != x)[hole].float().mean() > 0.9
    assert (fakes["zero"][hole] == -1).all() and fakes["generator"].abs().max() <= 1
    for image, inside, label in zip(fakes["patch"], hole, it.y):  # each of one other-class image
        donors = torch.stack([(d[inside] == image[inside]).all() for d in x])
        assert donors.any() and (it.y[donors] != label).all()

@torch.no_grad()
def test_the_generator_fills_under_a_mismatched_label():
    it, given = job(), []
    it.G = lambda x_m, y: given.append((x_m, y)) or (torch.zeros_like(x_m), None, None)
    x, hole = to_float(it.x), shift.random_mask(to_float(it.x), 0.3)[1]
    for _ in range(20):
        shift.generator(it)(x, hole, it.y)
    assert all((y != it.y).all() and (x_m[hole] == 0).all() for x_m, y in given)
    assert len(torch.cat([y for _, y in given]).unique()) == 3

def test_psi_learns_that_fakes_are_ood_and_images_without_an_object_make_none(
        tmp_path, monkeypatch):
    it = job(run=str(tmp_path), resume=False, bf16=False)
    it.net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(),
                                 torch.nn.Linear(392, 3))
    it.x[:] = torch.randint(56, it.x.shape)  # dark
    psi = shift.train_psi(it, "psi", dict(steps=60, seed=0), 200 + it.x)  # against bright
    dark, bright = (psi(shift.feature(it.net, to_float(x))) for x in (it.x, 200 + it.x))
    assert (dark < 0).all() and (bright > 0).all()
    some = lambda job: lambda x, y: (y != 0).float()[:, None, None, None] * torch.ones_like(x)
    monkeypatch.setitem(shift.ERASE, "cam", some)
    fakes = shift.make_fakes(it, {}, "cam", "zero", 0)
    assert len(fakes) == (it.y != 0).sum() and (fakes == 0).all()

@torch.no_grad()
def test_tiny_random_clipseg_and_diffusion(tmp_path, monkeypatch):
    transformers, diffusers = map(pytest.importorskip, ("transformers", "diffusers"))
    vocab = {chr(i) + end: 2 * i + bool(end) for i in range(33, 127) for end in ("", "</w>")}
    vocab.update({"<|startoftext|>": 0, "<|endoftext|>": 1})
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    tiny = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4)
    text = dict(tiny, vocab_size=300, projection_dim=32, bos_token_id=0, eos_token_id=1)
    net = transformers.CLIPSegForImageSegmentation(transformers.CLIPSegConfig(
        text_config=text, vision_config=dict(tiny, image_size=64, patch_size=16), reduce_dim=32,
        projection_dim=32, extract_layers=[0, 1, 2], decoder_intermediate_size=37)).eval()
    processor = transformers.CLIPSegProcessor(
        transformers.ViTImageProcessor(size=dict(height=64, width=64)), tokenizer)
    small = dict(block_out_channels=[32, 64], norm_num_groups=8)
    vae = diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2,
                                  up_block_types=["UpDecoderBlock2D"] * 2, **small)
    unet = diffusers.UNet2DConditionModel(
        in_channels=9, cross_attention_dim=32, down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2, sample_size=32, **small)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipe = diffusers.StableDiffusionInpaintPipeline(vae, encoder, tokenizer, unet, scheduler, None,
                                                    None, requires_safety_checker=False)
    it = job(models=[str(tmp_path / "seg"), str(tmp_path / "sd")])
    for part, folder in zip((net, processor, pipe), [it.models[0], *it.models]):
        part.save_pretrained(folder)
    monkeypatch.setattr(shift, "SIDE", 64)
    monkeypatch.setattr(shift, "DIFFUSION_STEPS", 2)
    x, y = to_float(it.x[:3]), it.y[:3]
    P = shift.clipseg(it)(x, y)
    cow = dict(text=["A photo of a cow"], images=[it.x[2].expand(3, -1, -1)])
    want = net(**processor(**cow, return_tensors="pt")).logits.sigmoid().reshape(1, 1, 64, 64)
    assert P.shape == (3, 1, 16, 16) and torch.allclose(F.avg_pool2d(want, 4), P[2:], atol=1e-4)
    fake, hole = shift.diffusion(it)(x, P >= P.median(), y), P >= P.median()
    assert torch.equal(fake[~hole], x[~hole]) and (fake != x)[hole].all() and fake.abs().max() <= 1

def test_shift_end_to_end_and_bad_input(tmp_path, monkeypatch, capsys):
    run, other = str(tmp_path / "run"), str(tmp_path / "flat.pt")
    train_gen.main(["--run", run, "--steps", "2", "--known-classes", *"0123"])
    train_scorer.main(["--run", run, "--steps", "1", "--classifier-steps", "100"])
    identity = lambda: train_scorer.load_classifier(run, None, "cpu")[1]
    before, flags = identity(), ["--run", run, "--steps", "12"]
    make_fakes, split = shift.make_fakes, train_gen.Split("digits", "train", [*"0123"], 16)
    train_psi, fakes = shift.train_psi, {}
    def watched(job, *words):
        assert torch.equal(job.x, split.x[~split.held])  # no held-out image trains
        return make_fakes(job, *words)
    monkeypatch.setattr(shift, "make_fakes", watched)
    monkeypatch.setattr(shift, "train_psi", lambda job, name, settings, x: (
        fakes.update({name: x}) or train_psi(job, name, settings, x)))
    read = lambda name: json.loads((tmp_path / "run" / name).read_text())
    shift.main([*flags, "--fill", "zero", "generator"])
    assert identity() == before
    first = read("shift.json")["predicted_labels"]
    names = [f"SHIFT {e}+{f} K=1" for e in ("cam", "random") for f in ("zero", "generator")]
    assert list(first) == ["MSP", "ODIN", "EBO", *names] and read("shift.json")["versions"]
    evaluate.main(["--run", run])
    assert read("results.json")["predicted_labels"]["MSP"] == first["MSP"]  # and its accuracy
    shift.main([*flags, "--fill", "zero", "--fakes", "1", "2", "--dev", "4", "5"])
    dev = read("shift_dev.json")  # no test image
    assert dev["n"]["unknown"] == 242 and "SHIFT random+zero K=2" in dev["predicted_labels"]
    one, two = fakes["psi_random_zero_1"], fakes["psi_random_zero_2"]
    assert len(two) == 2 * len(one) and torch.equal(two[:len(one)], one)
    assert not torch.equal(two[len(one):], one)  # another rectangle
    shift.main([*flags, "--fill", "zero", "--models", "no", "such"])  # play no part here
    again = read("shift.json")["predicted_labels"]
    assert all(again[k] == first[k] for k in again) and "\ncb " in capsys.readouterr().out
    other_classifier = dict(read("results.json"), classifier="0")
    (tmp_path / "run" / "results.json").write_text(json.dumps(other_classifier))
    mood.main(["--run", run, "--steps", "3", "--finetune-steps", "2"])
    assert f"no rows of {run}/shift.json" in (shown := capsys.readouterr().out) and "\ncb " in shown
    shift.main([*flags, "--fill", "zero"])
    assert f"no rows of {run}/results.json" in (shown := capsys.readouterr().out)
    assert "\ncb " not in shown and "\nMOOD pt+ft one " in shown
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))).save(other)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for words, line in ((["--classifier", other], "spatial features"),
                        (["--dev", "3", "4"], "two classes"), (["--dev", "4"], "two classes"),
                        (["--dev", "4", "5", "--ood", "svhn"], "no --ood"),
                        (["--fill", "diffusion"], "pip install"),
                        (["--fakes", "0"], "--fakes"), (["--fakes", "100"], "--fakes")):
        with pytest.raises(SystemExit) as end:
            run_script(lambda: shift.main([*flags, *words]))
        assert line in end.value.code and "\n" not in end.value.code

def test_shift_scores_do_not_depend_on_the_batch():
    it, psi = job(), shift.RejectionNetwork(64)
    x, one = it.x.repeat(7, 1, 1, 1), to_float(it.x[39:])  # rows 39 and, in another batch, 279
    whole, alone = (shift.score(it.net, {"psi": psi}, t, t[:, 0, 0, 0], 3) for t in (x, it.x[39:]))
    assert all(torch.allclose(whole[k][39::240], alone[k].expand(2), atol=1e-5) for k in whole)
    assert torch.allclose(-psi(shift.feature(it.net, one)), alone["psi"], atol=1e-5)

def test_shift_resumed_is_uninterrupted(tmp_path, monkeypatch):
    def run(folder):
        it = job(run=str(tmp_path / folder), resume=True, bf16=False)
        fakes = shift.make_fakes(it, {}, "random", "patch", 0)
        before = {k: v.clone() for k, v in it.net.state_dict().items()}
        psi = shift.train_psi(it, "psi", dict(steps=6, seed=0), fakes)
        assert all(torch.equal(v, before[k]) for k, v in it.net.state_dict().items())  # untouched
        return [fakes, *psi.parameters()]
    def cut(*words):
        for step, log in train_gen.training(*words):
            yield step, log
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(shift, "BATCH", 8)
    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(shift, "training", cut)
        for _ in range(4 + 5):  # after each step of the fakes, then of psi
            with pytest.raises(SystemExit, match="--resume"):
                run("cut")
    assert all(torch.equal(a, b) for a, b in zip(whole, run("cut"))) and len(whole[0]) == 40
    monkeypatch.setitem(shift.LAMBDA, "random", 2.0)  # nothing is left to erase
    with pytest.raises(ValueError, match="finds no object"):
        run("none")
