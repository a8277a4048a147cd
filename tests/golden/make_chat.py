"""Makes ``chat/golden.json``: conversations as transformers' ``apply_chat_template`` writes them.

    pip install transformers==5.23.0 jinja2==3.1.6
    python make_chat.py [FOLDER]        with a folder of templates: another golden.json there, of these

The templates are of the models that they are called after, as llama.cpp's ``models/templates`` has them (llama-cpp-python
0.3.36). They are data of these models and keep their licences: Apache-2.0 (Qwen, SmolLM3, Mistral, granite, gpt-oss, Seed-OSS,
Bielik), MIT (Phi, DeepSeek, GLM, MiniMax), modified MIT (Kimi), Llama 3.1 Community License (Llama, Hermes), Gemma Terms of Use
(gemma), CC-BY-NC-4.0 (command-r). ``strftime_now`` tells a fixed day.
"""

import json
import sys
from datetime import datetime
from pathlib import Path

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent / "chat"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
DAY = "2026-02-03 04:05:06"

SYSTEM = {"role": "system", "content": "Be <brief> & \"exact\"."}
USER, AGAIN = {"role": "user", "content": "  What is 2 + 3?\n"}, {"role": "user", "content": "Und mit Umlauten: äöü, 你好, 🙂?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
THOUGHT = {"role": "assistant", "content": "<think>\nTwo and three.\n</think>\n\nIt is 5."}
REASONED = {"role": "assistant", "content": "It is 5.", "reasoning_content": "Two and three."}
CALL = {
    "role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2, "b": 3, "note": "é \"q\""}}}
    ],
}  # fmt: skip
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "5"}
TOOLS = [{
    "type": "function", "function": {
        "name": "add", "description": "Adds two numbers — exactly.", "parameters": {
            "type": "object", "required": ["a", "b"], "properties": {
                "a": {"type": "number", "description": "The first"}, "b": {"type": "number"},
                "note": {"type": "string", "enum": ["x", "y"], "default": None},
            },
        },
    },
}]  # fmt: skip
CONVERSATIONS = {
    "user": {"messages": [USER]},
    "turns": {"messages": [USER, ANSWER, AGAIN]},
    "system": {"messages": [SYSTEM, USER, ANSWER, AGAIN]},
    "thought": {"messages": [USER, THOUGHT, AGAIN]},
    "reasoned": {"messages": [USER, REASONED, AGAIN]},
    "null": {"messages": [USER, {**ANSWER, "tool_calls": None, "name": None}, AGAIN]},
    "tools": {"messages": [SYSTEM, USER], "tools": TOOLS},
    "called": {"messages": [SYSTEM, USER, CALL, RESULT], "tools": TOOLS},
    "answered": {"messages": [USER, CALL, RESULT, ANSWER, AGAIN], "tools": TOOLS},
    "no_thinking": {"messages": [USER], "variables": {"enable_thinking": False, "thinking": True}},
    "twice_user": {"messages": [USER, AGAIN]},
}


class Day(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.fromisoformat(DAY)


def rendered(tokenizer, messages, tools=None, variables=None, prompt=True):
    """The text; None where the template refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **(variables or {})
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None


if __name__ == "__main__":
    chat_template_utils.datetime = Day
    folder = Path(sys.argv[1]) if sys.argv[1:] else HERE
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), **TOKENS)
    texts = {}
    for path in sorted(folder.glob("*.jinja")):
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        texts[path.stem] = {
            f"{name}{'' if prompt else ' whole'}": rendered(tokenizer, prompt=prompt, **given)
            for name, given in CONVERSATIONS.items() for prompt in (True, False)
        }  # fmt: skip
        print(path.stem, sum(x is None for x in texts[path.stem].values()), "refused")
    versions = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    golden = {"versions": versions, "day": DAY, "tokens": TOKENS, "conversations": CONVERSATIONS, "texts": texts}
    (folder / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
