"""Some of vLLM's endpoints, by transformers and PEFT alone: one model, adapters by name, greedy, token by token.

It knows nothing of lorchestra. Beside vLLM's own: ``/test/seen`` (bodies that came), ``/test/log`` (what happened).
Environment: ``LIKE_VERSION``, ``LIKE_LOAD_SECONDS``, ``LIKE_TOKEN_SECONDS``, ``LIKE_START_CODE`` (end at once).
"""

import argparse
import asyncio
import json
import os
import sys
import time

if code := os.environ.get("LIKE_START_CODE"):
    print("no memory for the base", flush=True)
    sys.exit(int(code))

import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

LOAD_SECONDS = float(os.environ.get("LIKE_LOAD_SECONDS", 0))
TOKEN_SECONDS = float(os.environ.get("LIKE_TOKEN_SECONDS", 0))


def keyed(request: Request):
    key = os.environ.get("VLLM_API_KEY")
    if key and request.url.path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {key}":
        raise HTTPException(401, "Unauthorized")


app = FastAPI(dependencies=[Depends(keyed)])
adapters: dict[str, str] = {}  # name → what PEFT calls it
paths: dict[str, str] = {}
seen: list[dict] = []
log: list[dict] = []
running = 0


def error(status, message, param=None):
    return JSONResponse({"error": {"message": message, "type": "BadRequest", "param": param, "code": status}}, status)


@app.get("/health")
def health():
    return PlainTextResponse("")


@app.get("/version")
def version():
    return {"version": os.environ.get("LIKE_VERSION", "0.32.0")}


@app.get("/test/seen")
def show_seen():
    return seen


@app.get("/test/log")
def show_log():
    return log


@app.get("/v1/models")
def models():
    base = {"id": options.served_model_name, "max_model_len": options.max_model_len, "parent": None}
    return {"data": [base, *({"id": name, "parent": base["id"]} for name in adapters)]}


@app.post("/v1/load_lora_adapter")
async def load(request: Request):
    global model
    body = await request.json()
    name, path = body["lora_name"], body["lora_path"]
    if not name or not path:
        return error(400, "Both 'lora_name' and 'lora_path' must be provided.")
    if name in adapters:
        return error(400, f"The lora adapter '{name}' has already been loaded.")
    with open(os.path.join(path, "adapter_config.json")) as file:
        rank = json.load(file)["r"]
    if rank > options.max_lora_rank:
        return error(500, f"LoRA rank {rank} is greater than max_lora_rank {options.max_lora_rank}.")
    log.append({"what": "load", "name": name, "running": running})
    inner = f"a{len(log)}"
    await asyncio.sleep(LOAD_SECONDS)
    if isinstance(model, PeftModel):
        model.load_adapter(path, inner)
    else:
        model = PeftModel.from_pretrained(model, path, adapter_name=inner).eval()
    adapters[name], paths[name] = inner, path
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@app.post("/v1/unload_lora_adapter")
async def unload(request: Request):
    name = (await request.json())["lora_name"]
    if name not in adapters:
        return error(404, f"The lora adapter '{name}' cannot be found.")
    log.append({"what": "unload", "name": name, "running": running})
    model.delete_adapter(adapters.pop(name))
    return PlainTextResponse("Success")


@torch.no_grad()
def logits(ids, name):
    if name is None:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                return model(ids).logits[0, -1].float()
    else:
        model.set_adapter(name)
    return model(ids).logits[0, -1].float()


async def generated(body, ids, request):
    """(text of a token, its log-probability), as they come."""
    global running
    known, mine, done = body["model"], list(ids), "cancelled"
    inner = adapters.get(known)
    running += 1
    try:
        for _ in range(body.get("max_tokens") or body.get("max_completion_tokens") or 16):
            if await request.is_disconnected():
                return
            spread = torch.log_softmax(logits(torch.tensor([mine]), inner), -1)
            token = int(spread.argmax())
            mine.append(token)
            yield tokenizer.decode([token]), float(spread[token])
            await asyncio.sleep(TOKEN_SECONDS)
        done = "finished"
    finally:
        running -= 1
        log.append({"what": done, "name": known, "at": time.time()})


async def answer(request: Request, chat: bool):
    body = await request.json()
    seen.append(body)
    if body["model"] != options.served_model_name and body["model"] not in adapters:
        return error(404, f"The model `{body['model']}` does not exist.")
    if chat:
        template = body.get("chat_template")
        variables = body.get("chat_template_kwargs") or {}
        text = tokenizer.apply_chat_template(
            body["messages"], chat_template=template, tokenize=False, add_generation_prompt=True, **variables
        )
    else:
        text = body["prompt"]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) > options.max_model_len:
        return error(400, f"This model's maximum context length is {options.max_model_len} tokens.", "prompt")

    def choice(word, part):
        if not chat:
            return {"index": 0, "text": word, "finish_reason": None}
        return {"index": 0, part: {"role": "assistant", "content": word}, "finish_reason": None}

    if body.get("stream"):

        async def parts():
            count = 0
            async for word, _ in generated(body, ids, request):
                count += 1
                usage = {"prompt_tokens": len(ids), "completion_tokens": count}
                yield f"data: {json.dumps({'choices': [choice(word, 'delta')], 'usage': usage})}\n\n"
                if body.get("user") == "fail":
                    yield f"data: {json.dumps({'error': {'message': 'it broke', 'code': 500}})}\n\n"
                    return
                if body.get("user") == "die":
                    os._exit(9)
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")
    words = [pair async for pair in generated(body, ids, request)]
    whole = choice("".join(word for word, _ in words), "message")
    whole["finish_reason"] = "length"
    if chat and body.get("tools"):
        whole["message"]["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        whole["message"]["reasoning"] = "because"
    if not chat and body.get("logprobs") is not None:
        whole["logprobs"] = {"tokens": [w for w, _ in words], "token_logprobs": [p for _, p in words]}
    return {"choices": [whole], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(words)}}


@app.post("/v1/completions")
async def completions(request: Request):
    return await answer(request, chat=False)


@app.post("/v1/chat/completions")
async def chat_completions(request: Request):
    return await answer(request, chat=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for text in ("--model", "--served-model-name", "--dtype", "--host"):
        parser.add_argument(text)
    for number in ("--max-model-len", "--max-loras", "--max-cpu-loras", "--max-lora-rank", "--port"):
        parser.add_argument(number, type=int)
    for flag in ("--enable-lora", "--trust-request-chat-template"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
