// Remote commands against a real SSH server on loopback, in this process.
package remote

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/pulumi/pulumi-go-provider/infer"

	"bulkhead/engine/command/lifecycle"
)

// machine is an SSH server that runs commands with /bin/sh and forwards connections.
type machine struct {
	port      float64
	hostKey   string // in authorized_keys form
	accepts   string // the one variable that AcceptEnv names
	password  string
	key       ssh.PublicKey
	forwarded atomic.Int32
	logins    atomic.Int32
}

func keyPair(t *testing.T, password string) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	signer, err := ssh.NewSignerFromKey(private)
	require.NoError(t, err)
	block, err := ssh.MarshalPrivateKey(private, "")
	if password != "" {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(private, "", []byte(password))
	}
	require.NoError(t, err)
	return signer, string(pem.EncodeToMemory(block))
}

func startMachine(t *testing.T, m *machine) *machine {
	t.Helper()
	signer, _ := keyPair(t, "")
	m.hostKey = string(ssh.MarshalAuthorizedKey(signer.PublicKey()))
	config := &ssh.ServerConfig{}
	if m.password != "" {
		config.PasswordCallback = func(_ ssh.ConnMetadata, given []byte) (*ssh.Permissions, error) {
			m.logins.Add(1)
			if string(given) == m.password {
				return nil, nil
			}
			return nil, errors.New("wrong password")
		}
	}
	if m.key != nil {
		config.PublicKeyCallback = func(_ ssh.ConnMetadata, given ssh.PublicKey) (*ssh.Permissions, error) {
			if string(given.Marshal()) == string(m.key.Marshal()) {
				return nil, nil
			}
			return nil, errors.New("wrong key")
		}
	}
	config.AddHostKey(signer)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { listener.Close() })
	m.port = float64(listener.Addr().(*net.TCPAddr).Port)
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			go m.serve(connection, config)
		}
	}()
	return m
}

func (m *machine) serve(connection net.Conn, config *ssh.ServerConfig) {
	server, channels, requests, err := ssh.NewServerConn(connection, config)
	if err != nil {
		return
	}
	defer server.Close()
	go ssh.DiscardRequests(requests)
	for channel := range channels {
		switch channel.ChannelType() {
		case "session":
			go m.session(channel)
		case "direct-tcpip":
			go m.forward(channel)
		default:
			_ = channel.Reject(ssh.UnknownChannelType, "")
		}
	}
}

func (m *machine) session(new ssh.NewChannel) {
	channel, requests, err := new.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	command := exec.Command("/bin/sh")
	for request := range requests {
		switch request.Type {
		case "env":
			var variable struct{ Name, Value string }
			_ = ssh.Unmarshal(request.Payload, &variable)
			accepted := strings.Contains(m.accepts, variable.Name)
			if accepted {
				command.Env = append(command.Env, variable.Name+"="+variable.Value)
			}
			_ = request.Reply(accepted, nil)
		case "exec":
			var payload struct{ Command string }
			_ = ssh.Unmarshal(request.Payload, &payload)
			_ = request.Reply(true, nil)
			command.Args = []string{"/bin/sh", "-c", payload.Command}
			command.Stdin, command.Stdout, command.Stderr = channel, channel, channel.Stderr()
			command.WaitDelay = time.Millisecond // the client may never close its side of stdin
			err := command.Run()
			code := 0
			if err != nil {
				code = command.ProcessState.ExitCode()
			}
			_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(code)}))
			return
		default:
			_ = request.Reply(false, nil)
		}
	}
}

func (m *machine) forward(new ssh.NewChannel) {
	var payload struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	_ = ssh.Unmarshal(new.ExtraData(), &payload)
	target, err := net.Dial("tcp", net.JoinHostPort(payload.Host, strconv.Itoa(int(payload.Port))))
	if err != nil {
		_ = new.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	channel, requests, err := new.Accept()
	if err != nil {
		return
	}
	m.forwarded.Add(1)
	go ssh.DiscardRequests(requests)
	go func() { _, _ = io.Copy(target, channel); target.Close() }()
	_, _ = io.Copy(channel, target)
	channel.Close()
}

func ptr[T any](value T) *T { return &value }

// endpoint logs in with a password and gives up at the first failure.
func (m *machine) endpoint() Endpoint {
	return Endpoint{
		Host: "127.0.0.1", Port: &m.port, User: ptr("someone"), Password: ptr(m.password),
		DialErrorLimit: ptr(0), PerDialTimeout: ptr(5),
	}
}

func inputs(connection Connection, create string) Inputs {
	return Inputs{Inputs: lifecycle.Inputs{Create: &create}, Connection: &connection}
}

func create(t *testing.T, given Inputs) (State, error) {
	t.Helper()
	t.Setenv("SSH_AUTH_SOCK", "")
	response, err := Command{}.Create(context.Background(), infer.CreateRequest[Inputs]{Name: "name", Inputs: given})
	return response.Output, err
}

func TestCreateRunsTheCommandOverSSH(t *testing.T) {
	m := startMachine(t, &machine{password: "right"})
	state, err := create(t, inputs(Connection{Endpoint: m.endpoint()}, "echo out; echo err >&2"))
	require.NoError(t, err)
	assert.Equal(t, lifecycle.Outputs{Stdout: "out", Stderr: "err"}, state.Outputs)
}

func TestStdinReachesTheCommand(t *testing.T) {
	m := startMachine(t, &machine{password: "right"})
	given := inputs(Connection{Endpoint: m.endpoint()}, "cat")
	given.Stdin = ptr("from stdin")
	state, err := create(t, given)
	require.NoError(t, err)
	assert.Equal(t, "from stdin", state.Stdout)
}

func TestUpdateSeesThePreviousOutputWhereTheServerAcceptsIt(t *testing.T) {
	m := startMachine(t, &machine{password: "right", accepts: "PULUMI_COMMAND_STDOUT"})
	given := inputs(Connection{Endpoint: m.endpoint()}, "false")
	given.Update = ptr("echo was $PULUMI_COMMAND_STDOUT")
	response, err := Command{}.Update(context.Background(), infer.UpdateRequest[Inputs, State]{
		Inputs: given, State: State{Outputs: lifecycle.Outputs{Stdout: "before", Stderr: "refused by the server"}},
	})
	require.NoError(t, err)
	assert.Equal(t, "was before", response.Output.Stdout)
}

func TestVariableThatTheServerRefusesIsAnErrorWithTheRemedy(t *testing.T) {
	m := startMachine(t, &machine{password: "right", accepts: "LANG"})
	given := inputs(Connection{Endpoint: m.endpoint()}, "true")
	given.Environment = &map[string]string{"COLOUR": "blue"}
	_, err := create(t, given)
	assert.ErrorContains(t, err, "COLOUR")
	assert.ErrorContains(t, err, "AcceptEnv")

	given.Environment = &map[string]string{"LANG": "C"}
	_, err = create(t, given)
	assert.NoError(t, err)
}

func TestFailedCommandIsAnErrorWithItsOutput(t *testing.T) {
	m := startMachine(t, &machine{password: "right"})
	_, err := create(t, inputs(Connection{Endpoint: m.endpoint()}, "echo why >&2; exit 4"))
	assert.ErrorContains(t, err, "status 4")
	assert.ErrorContains(t, err, "why")
}

func TestDeleteRunsDelete(t *testing.T) {
	m := startMachine(t, &machine{password: "right"})
	state := State{Inputs: inputs(Connection{Endpoint: m.endpoint()}, "true")}
	state.Delete = ptr("echo busy; false")
	_, err := Command{}.Delete(context.Background(), infer.DeleteRequest[State]{State: state})
	assert.ErrorContains(t, err, "busy")
}

func TestWrongPasswordIsTriedAsOftenAsTheLimitSays(t *testing.T) {
	m := startMachine(t, &machine{password: "right"})
	connection := Connection{Endpoint: m.endpoint()}
	connection.Password, connection.DialErrorLimit = ptr("wrong"), ptr(2)
	_, err := create(t, inputs(connection, "true"))
	assert.ErrorContains(t, err, "unable to authenticate")
	assert.ErrorContains(t, err, "attempt 3")
	assert.NotContains(t, err.Error(), "wrong")
	assert.Equal(t, int32(3), m.logins.Load())
}

func TestExpectedHostKeyIsAcceptedAndAnotherIsRefusedAtOnce(t *testing.T) {
	m := startMachine(t, &machine{password: "right"})
	connection := Connection{Endpoint: m.endpoint()}
	connection.HostKey = &m.hostKey
	_, err := create(t, inputs(connection, "true"))
	require.NoError(t, err)

	other, _ := keyPair(t, "")
	connection.HostKey = ptr(string(ssh.MarshalAuthorizedKey(other.PublicKey())))
	connection.DialErrorLimit = ptr(-1) // an unlimited number of attempts must not hide it
	_, err = create(t, inputs(connection, "true"))
	assert.ErrorIs(t, err, errHostKey)
	assert.ErrorContains(t, err, "SHA256:")

	connection.HostKey = ptr("no key")
	_, err = create(t, inputs(connection, "true"))
	assert.ErrorContains(t, err, "hostKey of 127.0.0.1")
}

func TestLoginWithPrivateKey(t *testing.T) {
	signer, plain := keyPair(t, "")
	m := startMachine(t, &machine{key: signer.PublicKey()})
	connection := Connection{Endpoint: m.endpoint()}
	connection.Password, connection.PrivateKey = nil, &plain
	_, err := create(t, inputs(connection, "true"))
	assert.NoError(t, err)

	locked, encrypted := keyPair(t, "open sesame")
	m = startMachine(t, &machine{key: locked.PublicKey()})
	connection.Port, connection.PrivateKey, connection.PrivateKeyPassword = &m.port, &encrypted, ptr("open sesame")
	_, err = create(t, inputs(connection, "true"))
	assert.NoError(t, err)

	connection.PrivateKeyPassword = ptr("wrong")
	_, err = create(t, inputs(connection, "true"))
	assert.ErrorContains(t, err, "privateKey for 127.0.0.1")
}

func TestLoginWithAgent(t *testing.T) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	keyring := agent.NewKeyring()
	require.NoError(t, keyring.Add(agent.AddedKey{PrivateKey: private}))
	socket := t.TempDir() + "/agent"
	listener, err := net.Listen("unix", socket)
	require.NoError(t, err)
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { _ = agent.ServeAgent(keyring, connection) }()
		}
	}()
	signer, err := ssh.NewSignerFromKey(private)
	require.NoError(t, err)
	m := startMachine(t, &machine{key: signer.PublicKey()})
	connection := Connection{Endpoint: m.endpoint()}
	connection.Password, connection.AgentSocketPath = nil, &socket
	_, err = create(t, inputs(connection, "true"))
	assert.NoError(t, err)

	connection.AgentSocketPath = ptr(socket + "-that-is-not-there")
	_, err = create(t, inputs(connection, "true"))
	assert.ErrorContains(t, err, "SSH agent for 127.0.0.1")
}

func TestProxyForwardsTheConnection(t *testing.T) {
	target := startMachine(t, &machine{password: "right"})
	bastion := startMachine(t, &machine{password: "door"})
	connection := Connection{Endpoint: target.endpoint(), Proxy: &ProxyConnection{bastion.endpoint()}}
	state, err := create(t, inputs(connection, "echo through"))
	require.NoError(t, err)
	assert.Equal(t, "through", state.Stdout)
	assert.Equal(t, int32(1), bastion.forwarded.Load())

	connection.Proxy.Password = ptr("wrong")
	_, err = create(t, inputs(connection, "true"))
	assert.ErrorContains(t, err, "proxy: connecting to")
}

func TestServerThatSaysNothingIsGivenUpAfterTheTimeout(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never answers
	require.NoError(t, err)
	t.Cleanup(func() { listener.Close() })
	port := float64(listener.Addr().(*net.TCPAddr).Port)
	m := &machine{port: port, password: "right"}
	connection := Connection{Endpoint: m.endpoint()}
	connection.PerDialTimeout = ptr(1)
	started := time.Now()
	_, err = create(t, inputs(connection, "true"))
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	assert.Less(t, time.Since(started), 5*time.Second)
}

func TestCancelEndsTheAttempts(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	connection := Connection{Endpoint: Endpoint{Host: "127.0.0.1", Port: ptr(1.0), DialErrorLimit: ptr(-1)}}
	started := time.Now()
	_, err := Command{}.Create(ctx, infer.CreateRequest[Inputs]{Name: "name", Inputs: inputs(connection, "true")})
	assert.Error(t, err)
	assert.Less(t, time.Since(started), 5*time.Second)
}

func TestCancelEndsACommandThatRuns(t *testing.T) {
	m := startMachine(t, &machine{password: "right"})
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	started := time.Now()
	_, err := Command{}.Create(ctx, infer.CreateRequest[Inputs]{
		Name: "name", Inputs: inputs(Connection{Endpoint: m.endpoint()}, "sleep 5"),
	})
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	assert.Less(t, time.Since(started), 4*time.Second)
}
