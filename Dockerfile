# The service on a CPU. For a GPU: take an NVIDIA CUDA image with Python 3.11, and the CUDA build of torch.
# docker build -t pylumiere . && docker run -p 8000:8000 -v clips:/data -v ./keys.txt:/keys.txt:ro pylumiere
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    "torch==2.13.0" setuptools cmake ninja nanobind
COPY . .
RUN pip install --no-cache-dir -c constraints.txt --no-build-isolation ".[serve]"

FROM python:3.11-slim-bookworm
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home lumiere && install -d -o lumiere /data
USER lumiere
VOLUME /data
EXPOSE 8000
# /keys.txt is made by: pylumiere serve-key NAME --file keys.txt
ENTRYPOINT ["pylumiere", "serve", "--host", "0.0.0.0", "--data", "/data", "--api-keys", "/keys.txt"]
CMD ["--memory-budget", "4GiB", "--keep-for", "7d", "--keep-size", "20GiB"]
