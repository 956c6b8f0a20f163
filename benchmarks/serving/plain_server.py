"""A plain server of the same route: transformers and torch, one question after the other.

python benchmarks/serving/plain_server.py MODEL
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlmjax.classification.settings import ask_for
from mlmjax.decisions.asking import PROMPT
from mlmjax.decisions.questions import read_question, show_text
from mlmjax.text.prompts import option_lines
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import option_names


def main():
    folder = sys.argv[1]
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = PROMPT + ask_for(Tokenizer.from_pretrained(folder))
    lock = threading.Lock()

    def answer(state, value):
        question = read_question(value)
        choices = f"CHOICES:\n{option_lines(question.shown)}"
        text = show_text(question.instructions)
        prompt = whole.format(text=state, question=text, choices=choices)
        inputs = tokenizer(prompt, return_tensors="pt")
        slot = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[-1, 0]
        names = option_names(len(question.shown))
        tokens = [tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in names]
        with torch.no_grad():
            logits = model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits
        shares = logits[0, slot, tokens].softmax(-1).tolist()
        return dict(zip(question.names, shares, strict=True))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                answers = {k: answer(request["state"], q) for k, q in request["questions"].items()}
            body = json.dumps({"answers": answers}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *parts):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}/", file=sys.stderr, flush=True)
    print("ready", file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
