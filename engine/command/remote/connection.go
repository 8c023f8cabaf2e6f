package remote

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/pulumi/pulumi-go-provider/infer"
)

// Endpoint is where and how to log in. Connection and ProxyConnection have the same fields.
type Endpoint struct {
	Host               string   `pulumi:"host"`
	Port               *float64 `pulumi:"port,optional"`
	User               *string  `pulumi:"user,optional"`
	Password           *string  `pulumi:"password,optional" provider:"secret"`
	PrivateKey         *string  `pulumi:"privateKey,optional" provider:"secret"`
	PrivateKeyPassword *string  `pulumi:"privateKeyPassword,optional" provider:"secret"`
	AgentSocketPath    *string  `pulumi:"agentSocketPath,optional"`
	DialErrorLimit     *int     `pulumi:"dialErrorLimit,optional"`
	PerDialTimeout     *int     `pulumi:"perDialTimeout,optional"`
	HostKey            *string  `pulumi:"hostKey,optional"`
}

var endpointNames = []string{
	"host", "port", "user", "password", "privateKey", "privateKeyPassword", "agentSocketPath", "dialErrorLimit",
	"perDialTimeout", "hostKey",
}

// Connection is the machine that the command runs on, perhaps behind a proxy (bastion).
type Connection struct {
	Endpoint
	Proxy *ProxyConnection `pulumi:"proxy,optional"`
}

// ProxyConnection is the proxy.
type ProxyConnection struct{ Endpoint }

const (
	defaultPort           = 22
	defaultUser           = "root"
	defaultDialErrorLimit = 10 // errors; -1 is no limit
	defaultPerDialTimeout = 15 // seconds; 0 is no limit
)

// Annotate gives defaults.
func (e *Endpoint) Annotate(a infer.Annotator) {
	a.SetDefault(&e.Port, defaultPort)
	a.SetDefault(&e.User, defaultUser)
	a.SetDefault(&e.DialErrorLimit, defaultDialErrorLimit)
	a.SetDefault(&e.PerDialTimeout, defaultPerDialTimeout)
}

// Annotate gives defaults.
func (c *Connection) Annotate(a infer.Annotator) { c.Endpoint.Annotate(a) }

// Annotate gives defaults.
func (c *ProxyConnection) Annotate(a infer.Annotator) { c.Endpoint.Annotate(a) }

func or[T any](value *T, otherwise T) T {
	if value == nil {
		return otherwise
	}
	return *value
}

func (e *Endpoint) address() string {
	return net.JoinHostPort(e.Host, strconv.Itoa(int(or(e.Port, defaultPort))))
}

// errHostKey ends all attempts: another machine may be answering.
var errHostKey = errors.New("the server's host key is not the expected one")

// config gives the ways to log in, in order: key, password, agent. release closes the agent's socket.
func (e *Endpoint) config() (config *ssh.ClientConfig, release func(), err error) {
	config = &ssh.ClientConfig{
		User:            or(e.User, defaultUser),
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), // as declared: without hostKey the key is not verified
		Timeout:         e.timeout(),
	}
	release = func() {}
	if e.HostKey != nil {
		expected, _, _, _, err := ssh.ParseAuthorizedKey([]byte(*e.HostKey))
		if err != nil {
			return nil, release, fmt.Errorf("hostKey of %s: %w", e.Host, err)
		}
		fixed := ssh.FixedHostKey(expected)
		config.HostKeyAlgorithms = algorithms(expected.Type())
		config.HostKeyCallback = func(host string, remote net.Addr, key ssh.PublicKey) error {
			if fixed(host, remote, key) != nil {
				return fmt.Errorf("%w: %s has %s %s", errHostKey, host, key.Type(), ssh.FingerprintSHA256(key))
			}
			return nil
		}
	}
	if e.PrivateKey != nil {
		signer, err := e.signer()
		if err != nil {
			return nil, release, fmt.Errorf("privateKey for %s: %w", e.Host, err)
		}
		config.Auth = append(config.Auth, ssh.PublicKeys(signer))
	}
	if e.Password != nil {
		answer := func(_, _ string, questions []string, _ []bool) ([]string, error) {
			answers := make([]string, len(questions))
			for i := range answers {
				answers[i] = *e.Password
			}
			return answers, nil
		}
		config.Auth = append(config.Auth, ssh.Password(*e.Password), ssh.KeyboardInteractive(answer))
	}
	socket := or(e.AgentSocketPath, os.Getenv("SSH_AUTH_SOCK"))
	if socket != "" {
		connection, err := net.Dial("unix", socket)
		switch {
		case err == nil:
			release = func() { _ = connection.Close() }
			config.Auth = append(config.Auth, ssh.PublicKeysCallback(agent.NewClient(connection).Signers))
		case e.AgentSocketPath != nil || len(config.Auth) == 0:
			return nil, release, fmt.Errorf("SSH agent for %s: %w", e.Host, err)
		}
	}
	return config, release, nil
}

func (e *Endpoint) signer() (ssh.Signer, error) {
	if e.PrivateKeyPassword != nil {
		return ssh.ParsePrivateKeyWithPassphrase([]byte(*e.PrivateKey), []byte(*e.PrivateKeyPassword))
	}
	return ssh.ParsePrivateKey([]byte(*e.PrivateKey))
}

// algorithms asks a server for the key that is expected, where it has several. An RSA key signs in three ways.
func algorithms(keyType string) []string {
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSA}
	}
	return []string{keyType}
}

func (e *Endpoint) timeout() time.Duration {
	return time.Duration(or(e.PerDialTimeout, defaultPerDialTimeout)) * time.Second
}

// connect logs in, through the proxy if there is one. close ends all that was opened.
func (c *Connection) connect(ctx context.Context) (client *ssh.Client, close func(), err error) {
	dialer := net.Dialer{}
	if c.Proxy == nil {
		return c.Endpoint.login(ctx, dialer.DialContext)
	}
	proxy, closeProxy, err := c.Proxy.Endpoint.login(ctx, dialer.DialContext)
	if err != nil {
		return nil, nil, fmt.Errorf("proxy: %w", err)
	}
	client, closeClient, err := c.Endpoint.login(ctx, proxy.DialContext)
	if err != nil {
		closeProxy()
		return nil, nil, err
	}
	return client, func() { closeClient(); closeProxy() }, nil
}

type dial func(ctx context.Context, network, address string) (net.Conn, error)

// login tries until it is in, or has failed more than dialErrorLimit times. A refused login is tried again too:
// a machine that still starts up may not have its users yet.
func (e *Endpoint) login(ctx context.Context, dial dial) (*ssh.Client, func(), error) {
	config, release, err := e.config()
	if err != nil {
		return nil, nil, err
	}
	limit := or(e.DialErrorLimit, defaultDialErrorLimit)
	wait := 100 * time.Millisecond
	for failures := 1; ; failures++ {
		client, err := e.attempt(ctx, dial, config)
		if err == nil {
			return client, func() { _ = client.Close(); release() }, nil
		}
		if errors.Is(err, errHostKey) || ctx.Err() != nil || (limit >= 0 && failures > limit) {
			release()
			return nil, nil, fmt.Errorf("connecting to %s as %s (attempt %d): %w", e.address(), config.User, failures, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(wait*3/2, 5*time.Second)
	}
}

func (e *Endpoint) attempt(ctx context.Context, dial dial, config *ssh.ClientConfig) (*ssh.Client, error) {
	timeout := e.timeout()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	connection, err := dial(ctx, "tcp", e.address())
	if err != nil {
		return nil, err
	}
	// A server that accepts and then says nothing must not hold the run: closing is what ends the handshake. (A
	// connection through a proxy has no deadlines.)
	release := context.AfterFunc(ctx, func() { _ = connection.Close() })
	var refused error
	verifying := *config
	verifying.HostKeyCallback = func(host string, remote net.Addr, key ssh.PublicKey) error {
		refused = config.HostKeyCallback(host, remote, key)
		return refused
	}
	client, channels, requests, err := ssh.NewClientConn(connection, e.address(), &verifying)
	inTime := release()
	if err != nil {
		_ = connection.Close()
		return nil, errors.Join(refused, ctx.Err(), err)
	}
	if !inTime {
		_ = client.Close()
		return nil, ctx.Err()
	}
	return ssh.NewClient(client, channels, requests), nil
}
