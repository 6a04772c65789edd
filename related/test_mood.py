"""python -m pytest -q related/test_mood.py: half a minute on a CPU, offline; timm where it is."""

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
from related import mood

SETTINGS = dict(width=16, depth=2, heads=2, codes=8, steps=4, finetune_steps=2, classes=["a", "b"],
                image_size=16, channels=1, seed=0)
DATA = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8), torch.arange(40) % 2

def arguments(run, resume=False):
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
        sums = [int(mood.blockwise_mask(*grid, rng).sum()) for _ in range(300)]
        assert max(sums) <= count and (count == 1 or np.mean(sums) > 0.85 * count)

def test_losses_check_values_and_masked_patches_only():
    y, logits = torch.tensor([0]), torch.tensor([[2.0, 1, 0]])
    assert mood.smoothed_loss(logits, y).item() == pytest.approx(0.507606, abs=1e-6)
    assert mood.smoothed_loss(logits, y, 0.0).item() == pytest.approx(0.407606, abs=1e-6)
    floor = torch.tensor([[0.91] + [0.01] * 9]).log()  # p is the smoothed label
    assert mood.smoothed_loss(floor, y).item() == pytest.approx(0.500288, abs=1e-6)
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

def test_resume_equals_an_uninterrupted_training_and_scores_any_batch(tmp_path, monkeypatch):
    whole = mood.stages(arguments(tmp_path / "a"), SETTINGS, *DATA)
    steps, loss = iter(range(4)), mood.mim_loss
    def interrupted(*inputs):
        if next(steps, None) == 1:
            signal.raise_signal(signal.SIGINT)
        return loss(*inputs)
    monkeypatch.setattr(mood, "mim_loss", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 2"):
        mood.stages(arguments(tmp_path / "b"), SETTINGS, *DATA)
    resumed = mood.stages(arguments(tmp_path / "b", resume=True), SETTINGS, *DATA)
    for stage, net in whole.items():
        again = resumed[stage].state_dict()
        assert all(torch.equal(v, again[k]) for k, v in net.state_dict().items()), stage
    x, y = DATA
    sets = dict(all=(x, y, None), some=(x[7:8], y[7:8], None))
    scores = mood.score("pt+ft", whole["pt+ft"], x, y, sets)
    for column in scores["all"]:
        assert torch.allclose(scores["all"][column][7:8], scores["some"][column], rtol=1e-3), column

def test_end_to_end_and_bad_input(run, capsys, monkeypatch):
    few = ["--run", run, "--device", "cpu", "--steps", "3", "--finetune-steps", "2"]
    mood.main(few)
    shown, saved = capsys.readouterr().out, json.loads(Path(run, "mood.json").read_text())
    rows = saved["predicted_labels"]
    assert all(name in shown for name in rows) and saved["n"]["unknown"] == 238
    assert {"MSP", "ODIN", "EBO", "cb", "MOOD neither cc", "MOOD ft long shared", "MOOD pt one",
            "MOOD ft one", "MOOD pt+ft one", "MOOD pt+ft GradNorm"} <= set(rows)
    mood.main([*few, "--dev", "4", "5"])
    saved = json.loads(Path(run, "dev-4-5", "mood.json").read_text())
    assert saved["settings"]["classes"] == list("0123") and "MSP" not in saved["predicted_labels"]
    with pytest.raises(ValueError, match="must leave two"):
        mood.main([*few, "--dev", "0", "1", "2", "3", "4"])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OSError, match="pip install timm"):
        mood.main([*few, "--backbone", "timm:beit_base_patch16_224.in22k_ft_in22k"])

def test_timm_end_to_end(run, monkeypatch):
    timm = pytest.importorskip("timm")
    tiny = lambda name, pretrained, num_classes: timm.models.beit.Beit(
        img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2, num_classes=num_classes)
    monkeypatch.setattr(timm, "create_model", tiny)
    net, x = mood.TimmNet("tiny", 6).eval(), torch.rand(2, 3, 32, 32) * 2 - 1  # the centre's 28
    tokens = net.net.forward_features(x[..., 2:30, 2:30])
    assert torch.allclose(net.features(x), net.net.fc_norm(tokens[:, 1:].mean(1)), atol=1e-5)
    mood.main(["--run", run, "--device", "cpu", "--finetune-steps", "1", "--backbone", "timm:tiny"])
    rows = json.loads(Path(run, "mood.json").read_text())["predicted_labels"]
    assert {"MOOD pt one", "MOOD pt+ft one", "MOOD pt+ft softmax"} <= set(rows)
