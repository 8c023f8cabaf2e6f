package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/gobwas/glob"

	"github.com/pulumi/pulumi/sdk/v3/go/common/resource"

	"bulkhead/engine/command/lifecycle"
)

// A cancelled command is asked to end with one signal after another, each a while after the one before it: shells
// start background jobs with interrupts ignored, and some programs ignore both requests.
var farewell = []struct {
	after  time.Duration
	signal syscall.Signal
}{{0, syscall.SIGINT}, {2 * time.Second, syscall.SIGTERM}, {8 * time.Second, syscall.SIGKILL}}

// run runs a command and puts what it gave into the state; nil is no command.
func run(ctx context.Context, command *string, state *State) error {
	if command == nil {
		return nil
	}
	interpreter := []string{"/bin/sh", "-c"}
	if state.Interpreter != nil && len(*state.Interpreter) > 0 {
		interpreter = *state.Interpreter
	}
	arguments := append(append([]string{}, interpreter[1:]...), *command)
	directory, err := os.Getwd()
	if err != nil {
		return err
	}
	if state.Dir != nil {
		directory = *state.Dir
		// Go blames the interpreter for a folder that is not there.
		if _, err := os.Stat(directory); err != nil {
			return fmt.Errorf("dir: %w", err)
		}
	}

	capture := lifecycle.NewCapture(ctx, state.Logging)
	process := exec.Command(interpreter[0], arguments...)
	process.Dir, process.Env = directory, environment(state)
	process.Stdout, process.Stderr = capture.Stdout, capture.Stderr
	if state.Stdin != nil {
		process.Stdin = strings.NewReader(*state.Stdin)
	}
	if err := runGroup(ctx, process); err != nil {
		return capture.Failure(err, *command)
	}
	state.Outputs = capture.Outputs()
	return collectFiles(directory, state)
}

func environment(state *State) []string {
	variables := os.Environ()
	if state.Environment != nil {
		for name, value := range *state.Environment {
			variables = append(variables, name+"="+value)
		}
	}
	for _, variable := range state.PreviousOutput(state.Outputs) {
		variables = append(variables, variable[0]+"="+variable[1])
	}
	return variables
}

// runGroup runs a process as the leader of a group of its own. When the engine cancels, the whole group
// gets the signals: a shell's children must not outlive it.
func runGroup(ctx context.Context, process *exec.Cmd) error {
	process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := process.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-ended:
			return
		case <-ctx.Done():
		}
		for _, step := range farewell {
			select {
			case <-ended:
				return
			case <-time.After(step.after):
				_ = syscall.Kill(-process.Process.Pid, step.signal)
			}
		}
	}()
	err := process.Wait()
	close(ended)
	<-stopped
	if ctx.Err() != nil {
		return errors.Join(ctx.Err(), err)
	}
	return err
}

// collectFiles reads the files that assetPaths and archivePaths name.
func collectFiles(directory string, state *State) error {
	state.Assets, state.Archive = nil, nil
	if state.AssetPaths != nil {
		assets, err := matching(directory, *state.AssetPaths)
		if err != nil {
			return err
		}
		state.Assets = &assets
	}
	if state.ArchivePaths != nil {
		assets, err := matching(directory, *state.ArchivePaths)
		if err != nil {
			return err
		}
		files := map[string]any{}
		for name, asset := range assets {
			files[name] = asset
		}
		if state.Archive, err = resource.NewAssetArchive(files); err != nil {
			return err
		}
	}
	return nil
}

// matching gives the files below a directory that the globs name; the rules are applied in order, and one that
// begins with ! takes files out again.
func matching(directory string, globs []string) (map[string]*resource.Asset, error) {
	type rule struct {
		exclude bool
		glob    glob.Glob
	}
	rules := make([]rule, 0, len(globs))
	for _, text := range globs {
		pattern, exclude := strings.CutPrefix(text, "!")
		compiled, err := glob.Compile(pattern, '/')
		if err != nil {
			return nil, err
		}
		rules = append(rules, rule{exclude, compiled})
	}
	assets := map[string]*resource.Asset{}
	err := fs.WalkDir(os.DirFS(directory), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		included := false
		for _, rule := range rules {
			if rule.glob.Match(name) {
				included = !rule.exclude
			}
		}
		if !included {
			return nil
		}
		assets[name], err = resource.NewPathAsset(path.Join(directory, name))
		return err
	})
	return assets, err
}
