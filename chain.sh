cd /opt/w/fx/live
mkdir both.started
(timeout 400 bash l/go-real.sh > l/go.out 2>&1)
(timeout 500 bash v/go.sh > v/go.out 2>&1)
kill 16625
