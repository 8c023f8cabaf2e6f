// Package compose holds the pinned versions of Docker Compose; the program itself is upstream's.
// See go.mod, and engine/build.py for how it is built.
package compose
