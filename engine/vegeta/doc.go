// Package vegeta holds the pinned versions of Vegeta, the benchmark's load; the program itself is upstream's.
// See go.mod, and engine/build.py for how it is built: only `make bench-interference` needs it.
package vegeta
