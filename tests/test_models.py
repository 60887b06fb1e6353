"""Real model families are routed as their code says, and docs/models.md is what the script prints."""

import importlib
import importlib.util
import math
import re

import models
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES

import orthdion
from orthdion.core.fold import SHAPE_KEYS, Fold

#: The least part of the hidden layers' weights that is stepped as matrices.
SHARES = {"DBRX": 0.65, "EnCodec": 0.85, "DAC": 0.85}  # (in, out) below each other; transposed convolutions


def need(*libraries):
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_weight_of_a_family_goes_where_its_code_says(family):
    need(family.library)
    found, expected = set(), set()
    hidden = stepped = 0
    for d in orthdion.param_groups(models.built(family)).decisions:
        algorithm = d.settings.get("algorithm")
        if algorithm is None:
            continue
        if models.is_vector(d.shape, d.name):
            assert algorithm == "adamw", d
            continue
        matrix = algorithm == "matrix"
        found.add((models.collapsed(d.name), "matrix" if matrix else "rest", models.keys_of(d.settings)))
        assert not matrix or not d.reason.startswith(("head", "embedding", "table", "norm", "router")), d
        if not d.reason.startswith(("head", "embedding", "table")):
            hidden += math.prod(d.shape)
            stepped += matrix * math.prod(d.shape)
    for names, alternatives in family.matrix.items():
        keys = [k for each in alternatives.split(" | ") for k in models.expanded(each)]
        expected |= {(n, "matrix", k) for n in models.expanded(names) for k in keys}
    expected |= {(n, "rest", "") for names in family.rest for n in models.expanded(names)}
    assert found == expected
    assert stepped >= SHARES.get(family.name, 0.94) * hidden, stepped / hidden


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_familys_groups_make_an_optimizer(family):
    need(family.library)
    orthdion.Muon(orthdion.param_groups(models.built(family).to_empty(device="cpu"), per_head=True))


def test_the_page_is_what_the_script_prints():
    need("transformers", "timm")
    text = models.PAGE.read_text()
    for name, version in re.findall(r"(transformers|timm) (\d[\w.]*\w)", text)[:2]:
        if importlib.import_module(name).__version__ != version:
            pytest.skip(f"the page was made with {name} {version}")
    assert text == models.page(), "PYTHONPATH=tests python -m models --write"


#: Models that were once routed wrongly: what builds them, and the ends of names that are for AdamW. The rest of the
#: names that look alike may be hidden layers.
ONCE_WRONG = {
    "timm crossvit_tiny_240": ["head.0.weight", "head.1.weight", "pos_embed_0"],
    "timm repvit_m0_9": ["head.head.l.weight", "head.head_dist.l.weight"],
    "timm dla34": ["fc.weight"],
    "timm dpn68": ["classifier.weight"],
    "timm tiny_vit_5m_224": ["head.fc.weight", "attention_biases"],
    "timm levit_128s": ["head.linear.weight", "head_dist.linear.weight", "attention_biases"],
    "timm mvitv2_tiny": ["head.fc.weight", "rel_pos_h", "rel_pos_w"],
    "timm inception_v4": ["last_linear.weight"],
    "timm inception_resnet_v2": ["classif.weight"],
    "timm deit_tiny_distilled_patch16_224": ["head.weight", "head_dist.weight"],
    "timm tnt_s_patch16_224": ["head.weight", "patch_pos", "pixel_pos"],
    "transformers BartForSequenceClassification": ["classification_head.out_proj.weight"],
    "transformers T5ForSequenceClassification": ["classification_head.out_proj.weight"],
    "transformers DPTForSemanticSegmentation": ["head.head.4.weight", "auxiliary_head.head.4.weight"],
    "transformers UperNetForSemanticSegmentation": [
        "decode_head.classifier.weight",
        "auxiliary_head.classifier.weight",
    ],
    "transformers MobileViTForSemanticSegmentation": ["segmentation_head.classifier.convolution.weight"],
    "transformers YolosForObjectDetection": [
        "class_labels_classifier.layers.2.weight",
        "bbox_predictor.layers.2.weight",
    ],
    "transformers RTDetrForObjectDetection": ["enc_score_head.weight", "class_embed.0.weight"],
    "transformers XLMForSequenceClassification": ["sequence_summary.summary.weight"],
    "transformers SwiftFormerForImageClassification": ["head.weight", "dist_head.weight"],
    "transformers SamVisionModel": ["rel_pos_h", "rel_pos_w"],
    "transformers PerceiverForMaskedLM": ["embeddings.latents"],
    "transformers HGNetV2ForImageClassification": ["fc.weight"],
    "transformers ViTMAEForPreTraining": ["decoder.decoder_pred.weight"],
    "transformers ViTForMaskedImageModeling": ["decoder.0.weight"],
    "transformers SwinForMaskedImageModeling": ["decoder.0.weight"],
}


@pytest.mark.parametrize("model", ONCE_WRONG)
def test_heads_and_tables_that_were_once_stepped_as_matrices(model):
    library, name = model.split()
    need(library)
    module = importlib.import_module(library)
    with torch.device("meta"):
        if library == "timm":
            built = module.create_model(name)
        else:
            kind = getattr(module, name)
            built = kind(kind.config_class())
    decisions = orthdion.param_groups(built).decisions
    for end in ONCE_WRONG[model]:
        found = [d for d in decisions if d.name.endswith(end)]
        assert found and all(d.settings["algorithm"] == "adamw" for d in found), (end, found[:1])
    matrices = [d for d in decisions if d.settings.get("algorithm") == "matrix"]
    assert sum(math.prod(d.shape) for d in matrices) > 0.4 * sum(math.prod(d.shape) for d in decisions)


FUSED = ["GPT-2", "Phi-3", "GPT-NeoX", "BLOOM", "Falcon", "GPT-BigCode", "MPT", "ModernBERT"]


@pytest.mark.parametrize("name", FUSED)
def test_the_last_part_of_fused_weights_is_what_computes_the_values(name, monkeypatch):
    need("transformers")

    def attend(q, k, v, *args, attend=F.scaled_dot_product_attention, **kwargs):
        return attend(q.detach(), k.detach(), v, *args, **kwargs)

    def weights(x, dim=-1, softmax=torch.softmax, **kwargs):
        return softmax(x, dim).detach()

    # Where the weights of attention are constants, only the rows of values have a gradient.
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(F, "softmax", weights)
    monkeypatch.setattr(torch, "softmax", weights)
    (family,) = [f for f in FAMILIES if f.name == name]
    torch.manual_seed(0)
    model = family.build(importlib.import_module(family.library)).float().eval()
    out = model(input_ids=torch.arange(5)[None] + 3).logits
    (out * torch.randn(out.shape)).sum().backward()
    seen = 0
    for d in orthdion.param_groups(model).decisions:
        if "QKV" not in d.reason:
            continue
        group = {**SHAPE_KEYS, **{k: v for k, v in d.settings.items() if k in SHAPE_KEYS}}
        fold, grad = Fold.of(torch.Size(d.shape), group), model.get_parameter(d.name).grad
        upright = grad.T if fold.transposed else grad
        parts = [fold.part(upright, k, (0, fold.rows), None) for k in range(fold.parts)]
        assert len(parts) == 3 and parts[2].norm(dim=1).min() > 0, d
        assert all(part.abs().max() == 0 for part in parts[:2]), d
        seen += 1
    assert seen


@pytest.mark.slow
def test_a_model_of_every_file_of_timm_keeps_its_classifier_and_tables_out_of_matrices():
    need("timm")
    import timm

    first = {}
    for name in timm.list_models():
        first.setdefault(timm.models.model_entrypoint(name).__module__, name)
    assert len(first) > 70
    for name in first.values():
        with torch.device("meta"):
            model = timm.create_model(name)
        heads = model.get_classifier()
        heads = heads if isinstance(heads, tuple) else (heads,)
        last = {id(p) for h in heads for p in h.parameters() if p.ndim > 1 and p.shape[0] == model.num_classes}
        decisions = orthdion.param_groups(model).decisions
        for d, p in zip(decisions, model.parameters(), strict=True):
            matrix = d.settings.get("algorithm") == "matrix"
            assert not matrix or id(p) not in last, (name, d)
            assert not matrix or not re.search(r"pos_emb\w*$|token$|table$|biases$|rel_pos\w*$", d.name), (name, d)
            assert "layout not known" not in d.reason, (name, d)


def test_names_are_brought_together_and_taken_apart():
    names = ["a.#.q.weight", "a.#.k.weight", "b.q", "c"]
    together = models.braced(names)
    assert together == ["a.#.{q,k}.weight", "b.q", "c"]
    assert sorted(n for each in together for n in models.expanded(each)) == sorted(names)
