"""Loading of base models and adapters for the checks, strictly."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def load_base(path: Path):
    """A Hugging Face folder, or a llama GGUF (the file itself or a folder with `model.gguf`), in f32."""
    if path.is_dir() and (path / "model.gguf").exists():
        path = path / "model.gguf"
    if path.suffix == ".gguf":
        from make_smollm2 import load_model

        return load_model(path)
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(what), f"{path}: {what} {info[what]}"
    return model.eval()


def load_adapted(base, folder: Path):
    """PEFT's own loader only warns about keys; here every tensor of the file must be in the model, and the reverse."""
    model = PeftModel.from_pretrained(base, folder).eval()
    saved, loaded = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    missing, extra = sorted(set(loaded) - set(saved)), sorted(set(saved) - set(loaded))
    assert not missing and not extra, f"{folder}: missing {missing[:3]}, extra {extra[:3]}"
    for name, value in saved.items():
        assert torch.equal(value.float(), loaded[name].float()), f"{folder}: `{name}` changed on the way"
    return model


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def compare(label: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    """Prints the largest difference, the share of equal argmaxes, and the verdict."""
    assert ours.shape == theirs.shape, f"{label}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    worst = float((ours - theirs).abs().max())
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    good = worst <= tolerance
    print(f"{label}: max |Δ| {worst:.2e} (tolerance {tolerance:.0e}), argmax equal at {same:.1%} of {ours.shape[0]} positions: {'ok' if good else 'FAIL'}")
    return good
