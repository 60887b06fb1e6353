"""TRL's SFTTrainer, whole and with LoRA."""

import pytest
import torch
from tiny import VOCABULARY, language_model, sentences, weights

import orthdion
from orthdion.integrations import Factory

trl = pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets", reason="trl needs datasets")
transformers = pytest.importorskip("transformers", reason="needs transformers")

HOOK = (Factory, {"optimizer": "completed-dion", "lr": 0.02, "scalar_lr": 0.01, "rank_fraction": 0.5})


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def trainer(folder, **options):
    known = {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 6, "seed": 3}
    known |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "max_length": 12}
    args = trl.SFTConfig(output_dir=str(folder), gradient_checkpointing=False, **known)
    rows = [{"text": " ".join(f"w{i % 30}" for i in row["input_ids"])} for row in sentences()]
    hook = {"optimizer_cls_and_kwargs": HOOK}
    data = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(language_model(), args, train_dataset=data, processing_class=tokenizer(), **hook, **options)


def losses(t):
    return [row["loss"] for row in t.state.log_history if "loss" in row]


def test_supervised_fine_tuning_and_its_resumption(tmp_path):
    t = trainer(tmp_path)
    t.train()
    assert isinstance(t.optimizer.optimizer, orthdion.CompletedDion)
    assert losses(t)[-1] < 0.9 * losses(t)[0]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses(again) == losses(t)
    for name, p in weights(t.model).items():
        assert torch.equal(p, dict(again.model.named_parameters())[name]), name


def test_lora_factors_are_the_only_weights_that_move(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    t = trainer(tmp_path, peft_config=lora)
    before = weights(t.model)
    t.train()
    found = {name: g["algorithm"] for g in t.optimizer.param_groups for name in g["param_names"]}
    assert found and all("lora_" in name for name in found)
    moved = {name for name, p in weights(t.model).items() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
