"""What the model cards of all adapters in the package share: the front matter, and how to load one."""

from __future__ import annotations

FRONT_MATTER = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
library_name: peft
language: en
tags: [lora, text-generation, {name}]
---
"""
USAGE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
from ultrafuser.model.references import package_path

gguf = package_path("{base}")
base = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
model = PeftModel.from_pretrained(base, package_path("package:ultrafuser/zoo/{folder}/{name}"))
```

The chat template is ChatML without a default system message.
"""
