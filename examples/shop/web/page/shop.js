// The shop's page: shows products, cart and orders, and sends what the visitor does to the API.
"use strict";

const cartId = localStorage.cart ||= Array.from(crypto.getRandomValues(new Uint8Array(16)),
  (byte) => byte.toString(16).padStart(2, "0")).join("");
const $ = (id) => document.getElementById(id);
const money = (cents) => (cents / 100).toFixed(2);

async function call(method, path, body) {
  const answer = await fetch(path, {method, body: body && JSON.stringify(body)});
  const content = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

// Text goes in as text, never as HTML: customers choose their names.
function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function button(label, action) {
  const made = element("button", label);
  made.type = "button";
  made.addEventListener("click", () => attempt(action));
  return made;
}

async function attempt(action) {
  try {
    $("message").textContent = await action() || "";
  } catch (error) {
    $("message").textContent = error.message;
  }
}

async function cartItems() {
  return (await call("GET", `/cart/${cartId}`)).items;
}

async function add(sku) {
  const items = await cartItems();
  const line = items.find((item) => item.sku === sku);
  if (line) line.quantity += 1; else items.push({sku, quantity: 1});
  await call("PUT", `/cart/${cartId}`, {items});
  await showCart();
}

async function placeOrder(customer) {
  const order = await call("POST", "/orders", {customer, items: await cartItems()});
  await call("DELETE", `/cart/${cartId}`);
  await Promise.all([showCart(), showOrders()]);
  setTimeout(showOrders, 1500); // by then the worker has processed it
  return `Thank you: order ${order.id}.`;
}

async function showProducts() {
  const {products} = await call("GET", "/products");
  $("products").replaceChildren(...products.map(({sku, price_cents}) => element("li",
    element("span", sku), element("span", money(price_cents)), button("Add", () => add(sku)))));
}

async function showCart() {
  const items = await cartItems();
  $("cart").replaceChildren(...items.map(({sku, quantity}) => element("li",
    element("span", sku), element("span", `× ${quantity}`))));
  $("order").hidden = items.length === 0;
}

async function showOrders() {
  const {orders} = await call("GET", "/orders?limit=10");
  $("orders").replaceChildren(...orders.map((order) => element("tr", ...[
    String(order.id), order.customer, order.items.map(({sku, quantity}) => `${quantity} ${sku}`).join(", "),
    order.status, order.total_cents === null ? "…" : money(order.total_cents),
  ].map((text) => element("td", text)))));
}

async function showVersion() {
  const {version, environment} = await call("GET", "/version");
  $("version").textContent = `${environment} · version ${version}`;
  document.title = `Chandlery (${environment})`;
}

$("order").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(() => placeOrder(new FormData(event.target).get("customer")));
});
for (const show of [showVersion, showProducts, showCart, showOrders]) attempt(show);
