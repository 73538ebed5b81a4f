"""An engine inside your own FastAPI service. Run: uvicorn embed_fastapi:app"""

import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, HTTPException, Response

import pylumiere


@asynccontextmanager
async def lifespan(app: FastAPI):
    with pylumiere.Engine.load("demo", memory_budget="4GiB", max_queue=16) as app.state.engine:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/clips", response_class=Response)
async def make_clip(prompt: str, num_frames: int = 16, seed: int | None = None):
    try:  # a client that leaves cancels the task, and that cancels the job
        video = await app.state.engine.submit(prompt, num_frames=num_frames, seed=seed, timeout=600)
    except (ValueError, MemoryError) as error:  # InvalidRequest, BudgetExceeded
        raise HTTPException(400, str(error)) from None
    except pylumiere.errors.QueueFull as error:
        raise HTTPException(429, str(error), {"Retry-After": "10"}) from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.save(path)
        return Response(path.read_bytes(), media_type="video/mp4")
