# The scheduler service: it runs the units. Build from the repository's root:
#   docker build -f deploy/docker/scheduler.Dockerfile -t muxserve-scheduler .
FROM docker.io/library/python:3.11-slim-bookworm AS build
WORKDIR /src
# No engine in this image: nothing is compiled.
ENV MUXSERVE_NATIVE=0
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/build_native.py scripts/
# The dependencies, by way of an empty package: a layer that stays as it is when the code changes.
RUN mkdir -p proto/muxserve services/muxserve gpu/muxserve \
 && python -m venv --without-pip /opt/muxserve \
 && pip --python /opt/muxserve/bin/python install --no-cache-dir -c constraints.txt ".[services]"
COPY proto proto
COPY services services
COPY gpu gpu
RUN pip --python /opt/muxserve/bin/python install --no-cache-dir --no-deps --force-reinstall .

FROM docker.io/library/python:3.11-slim-bookworm AS runtime
RUN useradd --system --uid 10001 --create-home muxserve
COPY --from=build /opt/muxserve /opt/muxserve
ENV PATH=/opt/muxserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MUXSERVE_BIND=0.0.0.0:8602
USER muxserve
WORKDIR /home/muxserve
EXPOSE 8602
ENTRYPOINT ["muxserve", "serve", "scheduler"]
