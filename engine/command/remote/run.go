package remote

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"

	p "github.com/pulumi/pulumi-go-provider"

	"bulkhead/engine/command/lifecycle"
)

// run runs a command and puts what it wrote into the state; nil is no command.
func run(ctx context.Context, command *string, state *State) error {
	if command == nil {
		return nil
	}
	client, closeAll, err := state.Connection.connect(ctx)
	if err != nil {
		return err
	}
	defer closeAll()
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	defer session.Close()
	if err := setEnvironment(ctx, session, state); err != nil {
		return err
	}

	capture := lifecycle.NewCapture(ctx, state.Logging)
	session.Stdout, session.Stderr = capture.Stdout, capture.Stderr
	if state.Stdin != nil {
		session.Stdin = strings.NewReader(*state.Stdin)
	}
	// When the engine cancels, the command is interrupted; a server may ignore signals, so the connection ends too.
	release := context.AfterFunc(ctx, func() {
		_ = session.Signal(ssh.SIGINT)
		_ = client.Close()
	})
	defer release()
	if err := session.Run(*command); err != nil {
		return capture.Failure(errors.Join(ctx.Err(), err), *command)
	}
	state.Outputs = capture.Outputs()
	return nil
}

// setEnvironment asks the server for variables. Those that the program wrote must be accepted; the previous
// command's output is given where the server takes it.
func setEnvironment(ctx context.Context, session *ssh.Session, state *State) error {
	const remedy = "this only works if the SSH server accepts the variable (AcceptEnv); " +
		"otherwise prefix the command: 'VAR=value command'"
	if state.Environment != nil {
		for name, value := range *state.Environment {
			if err := session.Setenv(name, value); err != nil {
				return fmt.Errorf("could not set environment variable %s on %s: %w; %s",
					name, state.Connection.Host, err, remedy)
			}
		}
	}
	for _, variable := range state.PreviousOutput(state.Outputs) {
		if err := session.Setenv(variable[0], variable[1]); err != nil {
			p.GetLogger(ctx).DebugStatusf("could not set %s on %s: %v; %s",
				variable[0], state.Connection.Host, err, remedy)
		}
	}
	return nil
}
