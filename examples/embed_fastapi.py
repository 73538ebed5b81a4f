"""An engine inside your own FastAPI service. Run: uvicorn embed_fastapi:app"""

import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Response

import pylumiere
from pylumiere.serve.loras import find_loras, lora_files

MODEL = "demo"  # or a folder as diffusers saves it
TEMPORAL_SHIFT = None  # 8 makes clips with such a folder
LORAS = None  # a folder of safetensors files, which requests name without the ending


@asynccontextmanager
async def lifespan(app: FastAPI):
    app.state.loras = find_loras(LORAS)
    with pylumiere.Engine.load(
        MODEL, temporal_shift=TEMPORAL_SHIFT, memory_budget="4GiB", max_queue=16
    ) as app.state.engine:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/clips", response_class=Response)
async def make_clip(
    prompt: str, num_frames: int = 16, seed: int | None = None, lora: Annotated[list[str] | None, Query()] = None
):
    """An mp4; of one frame a PNG."""
    try:  # a client that leaves cancels the task, and that cancels the job
        request = pylumiere.GenerationRequest(prompt=prompt, num_frames=num_frames, seed=seed, lora=lora)
        with lora_files(request, app.state.loras) as request:
            video = await app.state.engine.submit(request, timeout=600)
    except (ValueError, MemoryError) as error:  # InvalidRequest, BudgetExceeded
        raise HTTPException(400, str(error)) from None
    except pylumiere.errors.QueueFull as error:
        raise HTTPException(429, str(error), {"Retry-After": "10"}) from None
    name, media_type = ("clip.png", "image/png") if num_frames == 1 else ("clip.mp4", "video/mp4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        video.save(path)
        return Response(path.read_bytes(), media_type=media_type)
