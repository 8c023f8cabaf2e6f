package lifecycle

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"

	p "github.com/pulumi/pulumi-go-provider"
)

// Capture takes in what a command writes, and shows it line by line as `logging` says.
type Capture struct {
	Stdout, Stderr io.Writer

	out, err, shown bytes.Buffer
	hidden          bool // `logging` leaves a stream out
	mutex           sync.Mutex
	lines           []*lineWriter
	redactor        *strings.Replacer
}

// NewCapture is for one run of one command.
func NewCapture(ctx context.Context, logging *Logging) *Capture {
	capture := &Capture{redactor: redactor(ctx)}
	logger := p.GetLogger(ctx)
	show := func(line string) { logger.InfoStatus(capture.redactor.Replace(line)) }
	capture.Stdout = capture.stream(&capture.out, logging.shows(LogStdout), show)
	capture.Stderr = capture.stream(&capture.err, logging.shows(LogStderr), show)
	return capture
}

func (c *Capture) stream(own io.Writer, shown bool, show func(string)) io.Writer {
	writers := []io.Writer{own}
	if shown {
		line := &lineWriter{show: show}
		c.lines = append(c.lines, line)
		writers = append(writers, line, &c.shown)
	} else {
		c.hidden = true
	}
	return &lockedWriter{mutex: &c.mutex, to: io.MultiWriter(writers...)}
}

// Outputs ends the capture.
func (c *Capture) Outputs() Outputs {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for _, line := range c.lines {
		line.flush()
	}
	return Outputs{
		Stdout: strings.TrimSuffix(c.out.String(), "\n"),
		Stderr: strings.TrimSuffix(c.err.String(), "\n"),
	}
}

// Failure is the error of a command that failed: why, which command, and what it wrote, without secrets. A stream
// that `logging` leaves out stays out: who hid it had a reason.
func (c *Capture) Failure(cause error, command string) error {
	c.Outputs()
	note := ""
	if c.hidden {
		note = " (`logging` hides part of its output)"
	}
	return fmt.Errorf("%w: running %q%s:\n%s",
		cause, c.redactor.Replace(command), note, c.redactor.Replace(c.shown.String()))
}

type lockedWriter struct {
	mutex *sync.Mutex
	to    io.Writer
}

func (w *lockedWriter) Write(text []byte) (int, error) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return w.to.Write(text)
}

// lineWriter shows whole lines, of any length.
type lineWriter struct {
	show func(string)
	rest []byte
}

func (w *lineWriter) Write(text []byte) (int, error) {
	w.rest = append(w.rest, text...)
	for {
		line, rest, found := bytes.Cut(w.rest, []byte("\n"))
		if !found {
			return len(text), nil
		}
		w.show(string(line))
		w.rest = rest
	}
}

func (w *lineWriter) flush() {
	if len(w.rest) > 0 {
		w.show(string(w.rest))
		w.rest = nil
	}
}
