# docker build -t sitter .                            CPU
# docker build -t sitter --build-arg DEVICE=cuda .    NVIDIA; run with --gpus all
# docker run -p 8000:8000 -v sitter-data:/app/data -v sitter-output:/app/api/output --name sitter sitter
# It listens to others, so it asks for credentials (AUTH=required). Its log has a link that makes the first
# administrator, good for an hour; or: docker exec -it sitter sitter users add root --admin
FROM python:3.11-slim
ARG DEVICE=cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

# Dependencies first: this large layer stays while only the code changes.
COPY constraints.txt ./
COPY api/requirements.txt api/requirements.txt
RUN case "$DEVICE" in \
        cpu) index="--index-url https://download.pytorch.org/whl/cpu" ;; \
        cuda) index="" ;; \
        *) echo "DEVICE is cpu or cuda, not '$DEVICE'" >&2; exit 1 ;; \
    esac \
    && pip install --no-deps -c constraints.txt $index torch \
    && pip install -r api/requirements.txt

COPY pyproject.toml LICENSE ./
COPY models models
COPY api api
# Editable, so that the code finds models/ beside it as in a checkout; only what is written belongs to the user.
RUN pip install --no-deps -e . \
    && useradd --create-home --uid 1000 sitter \
    && mkdir -p api/output data \
    && chown -R sitter:sitter api/output data

USER sitter
ENV HOST=0.0.0.0 PORT=8000 AUTH=required
EXPOSE 8000
# The database and the key that signs sessions and seals prompts: keep them.
VOLUME /app/api/output /app/data
# The empty ProxyHandler keeps an http_proxy of the host out of the way.
HEALTHCHECK --interval=30s --timeout=6s --start-period=60s CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=5)"]
CMD ["sitter", "serve"]
